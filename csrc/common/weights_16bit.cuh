// A plain (N, K) weight of fp16 or bf16, row behind row as nn.Linear holds it, as a weight format of decode_linear.cuh.
//
// It does not matter which column the tensor core calls k. So a lane takes eight neighbouring columns of rows g and g +
// 8 of a tile, 16 bytes each, and what it copies to shared memory is what it multiplies.
//
// There is nothing to compute here but the products: what counts is that enough bytes are under way, 4 MB on an H200,
// all the time. A CTA has 48 to 96 KiB of them, and there is room for a second one on its multiprocessor, of this
// kernel or already of the next, whose first weights come while this one ends.
#pragma once

#include "decode_linear.cuh"

namespace hf_fastpath::linear {

template <typename T_>
struct Weights16Bit {
  using T = T_;
  static constexpr int kUnitCols = 32;
  static constexpr bool kRowScales = false, kWideOutput = true;
  static constexpr int kGroups = 0;

  static __device__ __forceinline__ uint4 prepared(const uint4& x) { return x; }

  template <int kTiles>
  struct StageOf {
    uint4 rows[kTiles][2][32];  // rows g, then rows g + 8, lane by lane
  };

  template <Epilogue kEpilogue, bool kWhole, int kWarps>
  class Source {
   public:
    __device__ __forceinline__ Source(const Params<T>& p, int first_row_tile, int padded_units, int lane)
        : policy_(evict_first_policy()),
          eight_rows_(static_cast<int64_t>(p.k) * 8 * sizeof(T)),
          row_step_(2 * eight_rows_ * row_step<kEpilogue>(p)),
          walk_(p.weight + static_cast<int64_t>(16 * first_row_tile + lane / 4) * p.k +
                    static_cast<int>(threadIdx.x / 32) * kUnitCols + 8 * (lane % 4),
                2 * eight_rows_ * kBlockRows<kEpilogue>, padded_units),
          rows_left_(p.n / kParts<kEpilogue> - 16 * first_row_tile - lane / 4) {}

    // What is not there (an empty unit, a row beyond the last) becomes 0 and is not read.
    __device__ __forceinline__ void copy(StageOf<kRowTiles<kEpilogue>>& stage, const Params<T>& p,
                                         const Cursor<kEpilogue, kWarps>& at, int lane) const {
#pragma unroll
      for (int r = 0; r < kRowTiles<kEpilogue>; ++r) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const bool there = at.unit < p.units && 16 * (r % kBlockRows<kEpilogue>)+8 * half < rows_left_;
          const unsigned char* source = walk_.at() + r * row_step_ + half * eight_rows_;
          cp_async16_once_of128(&stage.rows[r][half][lane], source, policy_, there);
        }
      }
    }
    __device__ __forceinline__ void advance(bool wrapped) {
      walk_.advance(wrapped);
      if (wrapped) rows_left_ -= 16 * kBlockRows<kEpilogue>;
    }

   private:
    uint64_t policy_;
    int64_t eight_rows_, row_step_;  // bytes of eight rows, and from one row tile of a block to the next
    Walk<kUnitCols * sizeof(T), kWarps> walk_;
    int rows_left_;  // from this lane's first row of the block to the end of its part of the weight
  };

  // acc += the unit's products, for row tile r.
  template <int kColTiles, int kTiles>
  static __device__ __forceinline__ void multiply(float (&acc)[kColTiles][4], const StageOf<kTiles>& stage, int r,
                                                  const Activations<kColTiles, kUnitCols>& x,
                                                  const GroupSums<0, kColTiles>&, int lane) {
    const uint4 low = stage.rows[r][0][lane], high = stage.rows[r][1][lane];
    const uint32_t a[2][4] = {{low.x, high.x, low.y, high.y}, {low.z, high.z, low.w, high.w}};
#pragma unroll
    for (int c = 0; c < kColTiles; ++c) {
      const uint4& b = x.half_tile[c][0];
      mma_m16n8k16<T>(acc[c], a[0], b.x, b.y);
      mma_m16n8k16<T>(acc[c], a[1], b.z, b.w);
    }
  }
};

// Two CTAs to a multiprocessor, but for the one whose registers hold 16 rows of x.
template <typename T>
struct Tuning<Weights16Bit<T>> {
  static __host__ __device__ constexpr int ctas_per_sm(Place place, int col_tiles, int, int) {
    return place == Place::kHeld && col_tiles == 2 ? 1 : 2;
  }
  // What leaves two CTAs room for their partial sums, and kShared for three rows of the longest K that it takes.
  static __host__ __device__ constexpr int stages(Place place, int col_tiles, int) {
    if (col_tiles == 2) return place == Place::kHeld ? 7 : 4;
    return place == Place::kShared ? 4 : 5;
  }
  static constexpr int kLongWarps = 8;
  // Five rows of 4,096 columns are more than the L1 has room for, and from the L2 they would come for every block.
  static constexpr int kHoldFrom = 5;
};

template <typename T>
Params<T> params_of(const Linear16BitArgs& a) {
  Params<T> p = {};
  p.x = static_cast<const T*>(a.x);
  p.x_row_stride = a.x_row_stride;
  p.weight = static_cast<const T*>(a.weight);
  p.bias = static_cast<const T*>(a.bias);
  p.y = a.float32_out ? nullptr : static_cast<T*>(a.y);
  p.wide_y = a.float32_out ? static_cast<float*>(a.y) : nullptr;
  p.m = a.m, p.n = a.n, p.k = a.k;
  p.row_tiles = (a.n + 15) / 16;
  p.units = a.k / Weights16Bit<T>::kUnitCols;
  p.residual = static_cast<const T*>(a.residual);
  p.norm_weight = static_cast<const T*>(a.norm_weight);
  p.eps = a.eps;
  return p;
}

template <typename T, Epilogue kEpilogue>
cudaError_t launch_16bit(const Linear16BitArgs& args, int sm_count, cudaStream_t stream) {
  const Params<T> p = params_of<T>(args);
  if (!aligned_rows(p) || !aligned_to(p.weight, 16)) return cudaErrorMisalignedAddress;
  if (args.m > kMaxLinearRows || args.k % Weights16Bit<T>::kUnitCols) return cudaErrorInvalidValue;
  return launch_for_size<Weights16Bit<T>, true, kEpilogue>(p, sm_count, stream);
}

}  // namespace hf_fastpath::linear
