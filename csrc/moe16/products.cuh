// The products of a mixture's 16-bit experts for a few rows of x: what both of moe_experts16.cu's kernels share.
//
// A CTA takes items, each a tile of 16 outputs of a slot's expert (slots.cuh), and its eight warps divide K in units of
// 64 columns: unit u is of warp u % 8. A warp has a ring of units under way in shared memory, which it fills and
// empties alone, and goes on filling with the next items' while others still add. The weights are the A operand of
// mma.m16n8k16, a slot's rows of x the B operand, in the order in which they lie in memory: eight neighbouring columns
// a lane, since it does not matter which column the tensor core calls "k". A warp's part of x stays in registers for
// all tiles of a slot if K has at most kHeldUnits units for each warp, else it is read again for each tile, some units
// ahead.
//
// The warps' sums of an item are added in their order. What a warp takes depends on K alone: a row's bits do not depend
// on the other rows, nor on the GPU's size.
#pragma once

#include "../common/dtype.cuh"
#include "../common/memory.cuh"
#include "slots.cuh"

namespace hf_fastpath::moe16 {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kTileRows = 16;  // of a weight
constexpr int kUnitCols = 64;  // 128 bytes: a line of the L2
constexpr int kUnitBytes = 2 * kUnitCols;
constexpr int kHeldUnits = 4;  // units of x that a warp has in registers
static_assert(kThreads == kMaxPairs);

// The experts' weights (N, K) of one product, one after the other.
struct Weight {
  const unsigned char* data;
  int64_t expert_bytes;
  int64_t half_bytes;  // from the first eight of a tile's rows to the others
  int row_bytes;
  int tile_rows;  // from a tile to the next
  int k, units;
};

// The items of a CTA: `left` of them, tiles first_tile .. end_tile of a slot before those of the next one.
struct Work {
  int slot, tile, first_tile, end_tile, left;

  __device__ __forceinline__ void advance() {
    if (++tile == end_tile) tile = first_tile, ++slot;
    --left;
  }
};

struct alignas(16) Stage {
  unsigned char bytes[kTileRows][kUnitBytes];
};

// A CTA's shared memory: this, then what else a kernel wants. kTokenTiles_: eights of rows that a slot can have;
// kStages_: of a warp's ring.
template <int kTokenTiles_, int kStages_>
struct alignas(16) Memory {
  static constexpr int kTokenTiles = kTokenTiles_, kStages = kStages_;

  Stage ring[kWarps][kStages];
  float4 sums[2][kWarps][kTokenTiles][32];  // C fragments; items take turns
  Slots slots;

  // In the rings' memory, which is larger; they are filled afterwards.
  __device__ __forceinline__ SlotScratch& scratch() { return *reinterpret_cast<SlotScratch*>(ring); }
  __device__ __forceinline__ unsigned char* end() { return reinterpret_cast<unsigned char*>(this + 1); }

  __device__ __forceinline__ void make_slots(const Choices& choices, int pairs_of_row) {
    moe::make_slots(slots, scratch(), choices, pairs_of_row);
    if constexpr (kTokenTiles > 1) join_slots(slots, scratch());
  }
  // An item's product for one of a slot's rows and one of a tile's outputs: the warps' sums in their order.
  __device__ __forceinline__ float total(int turn, int row, int output) const {
    const int lane = output % 8 * 4 + row % 8 / 2, place = output / 8 * 2 + row % 2;
    const float* const source = reinterpret_cast<const float*>(&sums[turn][0][row / 8][lane]) + place;
    float sum = source[0];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) sum += source[warp * kTokenTiles * 32 * 4];
    return sum;
  }
};

// Where a row's 16 bytes of a unit are in a stage: those of odd rows the other way round, so that two rows' are in
// different banks.
__device__ __forceinline__ int place_of(int row, int piece) {
  return row * kUnitBytes + (piece ^ (row % 2 * 4)) * 16;
}

// Fills a warp's ring with its units of item after item: eight lanes copy 128 bytes of a row.
class Source {
 public:
  __device__ __forceinline__ Source(const Weight& w, const Work& work, const Slots& slots, Stage* ring)
      : work_(work), unit_(threadIdx.x / 32), ring_(ring) {
    const int lane = threadIdx.x % 32;
    lane_offset_ = static_cast<int64_t>(lane / 8) * w.row_bytes + lane % 8 * 16;
    target_ = place_of(lane / 8, lane % 8);
    column_ = lane % 8 * 8;
    if (unit_ >= w.units) work_.left = 0;
    if (work_.left > 0) find_item(w, slots);
  }

  // What is not there, a tail of K, becomes 0 and is not read. Closes a group of copies, which may be empty.
  __device__ __forceinline__ void copy(const Weight& w, const Slots& slots, int stage) {
    if (work_.left > 0) {
      unsigned char* const target = ring_[stage].bytes[0] + target_;
      const bool there = unit_ * kUnitCols + column_ < w.k;
      const int64_t fourth = static_cast<int64_t>(4) * w.row_bytes;
      cp_async16(target, at_, there);
      cp_async16(target + 4 * kUnitBytes, at_ + fourth, there);
      cp_async16(target + 8 * kUnitBytes, at_ + w.half_bytes, there);
      cp_async16(target + 12 * kUnitBytes, at_ + w.half_bytes + fourth, there);
      at_ += kWarps * kUnitBytes;
      unit_ += kWarps;
      if (unit_ >= w.units) {
        work_.advance();
        unit_ = threadIdx.x / 32;
        if (work_.left > 0) find_item(w, slots);
      }
    }
    cp_async_commit();
  }

 private:
  __device__ __forceinline__ void find_item(const Weight& w, const Slots& slots) {
    at_ = w.data + slots.expert[work_.slot] * w.expert_bytes +
          static_cast<int64_t>(work_.tile) * w.tile_rows * w.row_bytes + lane_offset_ + unit_ * kUnitBytes;
  }

  Work work_;
  int unit_;
  Stage* ring_;
  const unsigned char* at_ = nullptr;
  int64_t lane_offset_;
  int target_, column_;
};

// This lane's part of a slot's rows of x: columns 8 t .. 8 t + 8 of each 32 of a unit, of rows g and g + 8.
template <typename T, int kTokenTiles>
struct Rows {
  const T* begin[kTokenTiles];
  int tiles;

  // Columns of a fragment that no row has get the last one once more.
  __device__ __forceinline__ Rows(const T* x, const Slots& slots, int slot, int k) {
    const int lane = threadIdx.x % 32, size = slots.size(slot), first = slots.begin[slot];
    tiles = (size + kSlotPairs - 1) / kSlotPairs;
#pragma unroll
    for (int c = 0; c < kTokenTiles; ++c) {
      const int row = slots.rows[first + min(lane / 4 + 8 * c, size - 1)];
      begin[c] = x + static_cast<int64_t>(row) * k + 8 * (lane % 4);
    }
  }
  __device__ __forceinline__ void load(uint4 (&part)[kTokenTiles][2], int unit, int k) const {
    const int column = unit * kUnitCols, lane_column = column + 8 * (static_cast<int>(threadIdx.x) % 4);
#pragma unroll
    for (int c = 0; c < kTokenTiles; ++c) {
      if (c > 0 && c >= tiles) continue;  // there is a first one
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const bool there = lane_column + 32 * h < k;
        part[c][h] = there ? load_early16(begin[c] + column + 32 * h) : make_uint4(0, 0, 0, 0);
      }
    }
  }
};

// Adds the products of a unit.
template <typename T, int kTokenTiles>
__device__ __forceinline__ void multiply_unit(float (&acc)[kTokenTiles][4], const Stage& stage,
                                              const uint4 (&x)[kTokenTiles][2], int tiles) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const unsigned char* const place = stage.bytes[0] + place_of(g, t + 4 * h);
    const uint4 low = *reinterpret_cast<const uint4*>(place);
    const uint4 high = *reinterpret_cast<const uint4*>(place + 8 * kUnitBytes);
#pragma unroll
    for (int c = 0; c < kTokenTiles; ++c) {
      if (c > 0 && c >= tiles) continue;  // there is a first one
      mma_m16n8k16<T>(acc[c], {low.x, high.x, low.y, high.y}, x[c][h].x, x[c][h].y);
      mma_m16n8k16<T>(acc[c], {low.z, high.z, low.w, high.w}, x[c][h].z, x[c][h].w);
    }
  }
}

// Multiplies a CTA's items. ready() is called once, before x is read and after the first weights are asked for;
// before_last() once the last weights are; finish(slot, tile, turn) for every item, by all threads, when
// memory.total(turn, ...) is there.
template <typename T, typename Memory, typename Ready, typename BeforeLast, typename Finish>
__device__ __forceinline__ void multiply_items(Memory& memory, const Weight& w, const T* x, Work work, Ready ready,
                                               BeforeLast before_last, Finish finish) {
  constexpr int kTokenTiles = Memory::kTokenTiles, kStages = Memory::kStages;
  const Slots& slots = memory.slots;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Stage* const ring = memory.ring[warp];
  Source source(w, work, slots, ring);
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) source.copy(w, slots, s);
  ready();
  uint4 held[kHeldUnits][kTokenTiles][2];
  constexpr int kPassUnits = kHeldUnits * kWarps;
  const auto load = [&](int i, const Rows<T, kTokenTiles>& rows, int first_unit) {
    const int unit = first_unit + i * kWarps + warp;
    if (unit < w.units) rows.load(held[i], unit, w.k);
  };
  if (work.left > 0) {
    const Rows<T, kTokenTiles> rows(x, slots, work.slot, w.k);
#pragma unroll
    for (int i = 0; i < kHeldUnits; ++i) load(i, rows, 0);
  }
  int stage = 0, turn = 0;
  while (work.left > 0) {
    const int slot = work.slot, tile = work.tile, tiles = (slots.size(slot) + kSlotPairs - 1) / kSlotPairs;
    work.advance();
    if (work.left == 0) before_last();
    float acc[kTokenTiles][4] = {};
    for (int first = 0; first < w.units; first += kPassUnits) {
      // What the registers hold next, if that is something else.
      const bool last = first + kPassUnits >= w.units;
      const bool reload = last ? work.left > 0 && (w.units > kPassUnits || work.slot != slot) : true;
      const Rows<T, kTokenTiles> rows(x, slots, last && reload ? work.slot : slot, w.k);
#pragma unroll
      for (int i = 0; i < kHeldUnits; ++i) {
        if (first + i * kWarps + warp < w.units) {
          cp_async_wait<kStages - 2>();
          __syncwarp();  // all lanes' copies are there, and all have read the stage that is filled now
          source.copy(w, slots, stage == 0 ? kStages - 1 : stage - 1);
          multiply_unit<T>(acc, ring[stage], held[i], tiles);
          stage = stage + 1 == kStages ? 0 : stage + 1;
        }
        if (reload) load(i, rows, last ? 0 : first + kPassUnits);
      }
    }
#pragma unroll
    for (int c = 0; c < kTokenTiles; ++c) {
      if (c == 0 || c < tiles)
        memory.sums[turn][warp][c][lane] = make_float4(acc[c][0], acc[c][1], acc[c][2], acc[c][3]);
    }
    __syncthreads();
    finish(slot, tile, turn);
    turn ^= 1;
  }
}

}  // namespace hf_fastpath::moe16
