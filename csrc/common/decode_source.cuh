// Where the products of decode_linear.cuh read their weights: pointers that move by constants, since computing an
// address anew for every unit took more instructions than multiplying it.
#pragma once

#include "decode_types.cuh"

namespace hf_fastpath::linear {

// The row tiles of a CTA, counted in each part of the weight: whole blocks, the first CTAs taking one more.
template <Epilogue kEpilogue>
struct RowRange {
  int first, count;

  __device__ __forceinline__ explicit RowRange(int row_tiles) {
    constexpr int kRows = kBlockRows<kEpilogue>;
    row_tiles /= kParts<kEpilogue>;
    const int blocks = (row_tiles + kRows - 1) / kRows, cta = blockIdx.x, ctas = gridDim.x;
    const int each = blocks / ctas, more = blocks - each * ctas;
    first = (cta * each + min(cta, more)) * kRows;
    count = min((each + (cta < more)) * kRows, row_tiles - first);
  }
};

// Where a warp is in its sequence of units: those of one block of row tiles, kWarps apart, then those of the next.
template <Epilogue kEpilogue, int kWarps>
struct Cursor {
  int unit;       // may lie beyond the last unit: an empty one, so that all warps meet at every barrier
  int rows_left;  // row tiles from the block's first to the CTA's last
  bool wrapped;   // the last move went to a new block

  // Whether the block has its row tile r.
  __device__ __forceinline__ bool there(int r) const { return kBlockRows<kEpilogue> == 1 || r < rows_left; }

  __device__ __forceinline__ void advance(int padded_units) {
    unit += kWarps;
    wrapped = unit >= padded_units;
    if (!wrapped) return;
    unit -= padded_units;
    rows_left -= kBlockRows<kEpilogue>;
  }
};

// A pointer into something that has `block_bytes` for each block of row tiles and kUnitBytes for each unit.
template <int kUnitBytes, int kWarps>
class Walk {
 public:
  __device__ __forceinline__ Walk(const void* base, int64_t block_bytes, int padded_units)
      : at_(static_cast<const unsigned char*>(base)),
        to_next_block_(block_bytes - static_cast<int64_t>(padded_units) * kUnitBytes) {}
  __device__ __forceinline__ void advance(bool wrapped) {
    at_ += kWarps * kUnitBytes;
    if (wrapped) at_ += to_next_block_;
  }
  __device__ __forceinline__ const unsigned char* at() const { return at_; }

 private:
  const unsigned char* at_;
  int64_t to_next_block_;
};

// The row tiles of a block are row_step() apart: neighbours, or the same tile of each part.
template <Epilogue kEpilogue, typename T>
__device__ __forceinline__ int row_step(const Params<T>& p) {
  return kParts<kEpilogue> > 1 ? p.row_tiles / kParts<kEpilogue> : 1;
}

// The tiles themselves: a unit is two tiles of 512 bytes, 16 bytes a lane of each.
template <Epilogue kEpilogue, bool kWhole, int kWarps>
class TileSource {
 public:
  template <typename T>
  __device__ __forceinline__ TileSource(const Params<T>& p, int first_row_tile, int padded_units, int lane)
      : row_step_(static_cast<int64_t>(row_step<kEpilogue>(p)) * p.col_tiles * 512),
        walk_(p.qweight + (static_cast<int64_t>(first_row_tile) * p.col_tiles + 2 * (threadIdx.x / 32)) * 32 + lane,
              kBlockRows<kEpilogue> * static_cast<int64_t>(p.col_tiles) * 512, padded_units) {}

  // A tail of K becomes 0 and is not read. Of a row tile beyond the last the first of the block is read instead.
  template <typename T>
  __device__ __forceinline__ void copy(uint4 (&tiles)[kRowTiles<kEpilogue>][2][32], const Params<T>& p,
                                       const Cursor<kEpilogue, kWarps>& at, int lane) const {
#pragma unroll
    for (int r = 0; r < kRowTiles<kEpilogue>; ++r) {
      const unsigned char* source = walk_.at() + (at.there(r) ? r * row_step_ : 0);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        cp_async16(&tiles[r][c][lane], source + 512 * c, kWhole || at.unit * 2 + c < p.col_tiles);
      }
    }
  }
  __device__ __forceinline__ void advance(bool wrapped) { walk_.advance(wrapped); }

 private:
  int64_t row_step_;  // bytes from one row tile of a block to the next
  Walk<1024, kWarps> walk_;
};

// Values of V, 16 for each group of a row tile: lane by lane four bytes, of all row tiles of a block in one go.
template <typename V, int kGroups, Epilogue kEpilogue, bool kWhole, int kWarps>
class ValueSource {
 public:
  template <typename T>
  __device__ __forceinline__ ValueSource(const V* values, const Params<T>& p, int groups, int first_row_tile,
                                         int padded_units, int lane)
      : row_bytes_(groups * kGroupBytes),
        walk_(nullptr, kBlockRows<kEpilogue> * static_cast<int64_t>(groups) * kGroupBytes, padded_units) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int64_t row_tile = first_row_tile + static_cast<int64_t>(row(i, lane)) * row_step<kEpilogue>(p);
      const int64_t group = row_tile * groups + static_cast<int>(threadIdx.x / 32) * kGroups;
      first_[i] = reinterpret_cast<const unsigned char*>(values) + group * kGroupBytes + word(i, lane) % kRowWords * 4;
    }
  }

  __device__ __forceinline__ void copy(V* target, int groups, const Cursor<kEpilogue, kWarps>& at, int lane) const {
    const int groups_left = groups - at.unit * kGroups;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      if (word(i, lane) >= kRowTiles<kEpilogue> * kRowWords) continue;
      const unsigned char* source = first_[i] - (at.there(row(i, lane)) ? 0 : row_bytes_);
      const bool there = kWhole || word(i, lane) % kRowWords * 4 < groups_left * kGroupBytes;
      cp_async4(reinterpret_cast<unsigned char*>(target) + 4 * word(i, lane),
                source + reinterpret_cast<intptr_t>(walk_.at()), there);
    }
  }
  __device__ __forceinline__ void advance(bool wrapped) { walk_.advance(wrapped); }

 private:
  static constexpr int kGroupBytes = 16 * sizeof(V), kRowWords = kGroups * kGroupBytes / 4;
  static constexpr int kCopies = (kRowTiles<kEpilogue> * kRowWords + 31) / 32;
  static __device__ __forceinline__ int word(int i, int lane) { return 32 * i + lane; }
  static __device__ __forceinline__ int row(int i, int lane) { return word(i, lane) / kRowWords; }

  int row_bytes_;
  const unsigned char* first_[kCopies];
  Walk<kGroups * kGroupBytes, kWarps> walk_;
};

}  // namespace hf_fastpath::linear
