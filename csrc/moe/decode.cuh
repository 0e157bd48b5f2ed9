// The products of a mixture's packed experts for a few rows of x: what both of moe_experts.cu's kernels share.
//
// A CTA takes one block of an expert's outputs, kTiles tiles of 16 of them, for its share of the slots (slots.cuh). K
// is cut into at most eight chains of whole units; a chain of a slot is a task, and a CTA's warps take the tasks in
// turn, each with a ring of weights under way in shared memory that it fills and empties alone
// (common/decode_linear.cuh). Chains' sums meet in shared memory once the slots of a round are done, and are added in
// the order of K. What a chain is depends on K alone: a row's bits do not depend on the other rows, on the warps or on
// the GPU's size.
#pragma once

#include "../common/int4_weights.cuh"
#include "slots.cuh"

namespace hf_fastpath::moe {

using linear::Activations;
using linear::GroupSums;

constexpr int kUnitCols = 128;
constexpr int kMaxChains = 8;
constexpr int kRoundPairs = 8;  // whose sums shared memory has room for; at least kMaxSlotPairs

// The experts' packed weights of one product (packing.py), one after the other.
struct Part {
  const unsigned char* qweight;
  const unsigned char* scales;
  const unsigned char* zeros;
  int k, row_tiles, col_tiles, groups;  // of an expert
  int units, chain_units, chains;
};

inline Part make_part(const MoeWeight& weight, int n, int k, int group_size) {
  const int units = (k + kUnitCols - 1) / kUnitCols, chain_units = (units + kMaxChains - 1) / kMaxChains;
  return {static_cast<const unsigned char*>(weight.qweight),
          static_cast<const unsigned char*>(weight.scales),
          weight.zeros,
          k,
          n / 16,
          (k + 63) / 64,
          k / group_size,
          units,
          chain_units,
          (units + chain_units - 1) / chain_units};
}

// A warp's way through its tasks, which are kWarps apart, and through the units of each.
template <int kWarps>
struct Cursor {
  int slot, chain, unit;  // unit: of the chain

  __device__ __forceinline__ Cursor(const Part& p, int first_slot)
      : slot(first_slot), chain(threadIdx.x / 32), unit(0) {
    settle(p);
  }
  // Returns whether that leads to another task.
  __device__ __forceinline__ bool advance(const Part& p) {
    if (++unit < min(p.chain_units, p.units - chain * p.chain_units)) return false;
    unit = 0;
    chain += kWarps;
    settle(p);
    return true;
  }

 private:
  __device__ __forceinline__ void settle(const Part& p) {
    while (chain >= p.chains) chain -= p.chains, ++slot;
  }
};

// Fills stages of the ring: lane l copies 16 bytes of each tile, and 16 bytes of scales or zeros.
template <typename W, int kTiles>
class Source {
 public:
  using Stage = typename W::template Stage<kTiles>;

  // tile_step: row tiles from one of the block's tiles to the next.
  __device__ __forceinline__ Source(const Part& p, int row_tile, int tile_step, int lane)
      : tiles_(p.qweight + static_cast<int64_t>(row_tile) * p.col_tiles * 512 + lane * 16),
        tile_bytes_(static_cast<int64_t>(tile_step) * p.col_tiles * 512),
        expert_tiles_(static_cast<int64_t>(p.row_tiles) * p.col_tiles * 512) {
    constexpr int kScaleLanes = 2 * kTiles * W::kGroups, kZeroLanes = W::kHasZeros ? kTiles * W::kGroups : 0;
    static_assert(kScaleLanes + kZeroLanes <= 32);
    const bool scales = lane < kScaleLanes;
    const int piece = scales ? lane : lane - kScaleLanes, pieces = scales ? 2 : 1;  // 16 bytes each, pieces: a group's
    const int tile = piece / (pieces * W::kGroups), within = piece % (pieces * W::kGroups);
    has_value_ = lane < kScaleLanes + kZeroLanes;
    group_ = within / pieces;
    group_bytes_ = 16 * pieces;
    const int64_t first = static_cast<int64_t>(row_tile + tile * tile_step) * p.groups * group_bytes_;
    values_ = (scales ? p.scales : p.zeros) + first + within * 16;
    expert_values_ = static_cast<int64_t>(p.row_tiles) * p.groups * group_bytes_;
    target_ = static_cast<int>(offsetof(Stage, scales)) + lane * 16;
    if (!scales) target_ = static_cast<int>(offsetof(Stage, zeros)) + piece * 16;
  }

  __device__ __forceinline__ void start(const Part& p, int expert, int chain) {
    unit_ = chain * p.chain_units;
    at_ = tiles_ + expert * expert_tiles_ + unit_ * 1024;
    values_at_ = values_ + expert * expert_values_ + unit_ * W::kGroups * group_bytes_;
  }
  // What is not there, a tail of K, becomes 0 and is not read.
  __device__ __forceinline__ void copy(Stage& stage, const Part& p, int lane) {
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        cp_async16(&stage.tile[r][c][lane], at_ + r * tile_bytes_ + 512 * c, 2 * unit_ + c < p.col_tiles);
      }
    }
    if (has_value_) {
      cp_async16(reinterpret_cast<unsigned char*>(&stage) + target_, values_at_,
                 unit_ * W::kGroups + group_ < p.groups);
    }
    ++unit_;
    at_ += 1024;
    values_at_ += W::kGroups * group_bytes_;
  }

 private:
  const unsigned char* tiles_;
  const unsigned char* values_;
  const unsigned char* at_;
  const unsigned char* values_at_;
  int64_t tile_bytes_, expert_tiles_, expert_values_;
  int unit_, group_, group_bytes_, target_;
  bool has_value_;
};

// A slot's rows of x in a stage: 128 columns each, 16 chunks of 16 bytes. Odd rows have their halves of 64 bytes
// swapped in pairs, so that the eight lanes that read together, four of each of two rows, meet no bank twice.
__device__ __forceinline__ int chunk_of(int row, int chunk) {
  return 16 * row + (chunk ^ row % 2 * 4);
}

// Fills them: lanes copy 16 bytes each of two rows at a time.
template <typename T>
class RowSource {
 public:
  __device__ __forceinline__ void start(const Part& p, const Slots& slots, const T* x, int slot, int chain, int lane) {
    pairs_ = slots.rows + slots.begin[slot];
    count_ = slots.size(slot);
    column_ = chain * p.chain_units * kUnitCols + lane % 16 * 8;
    if (lane / 16 < count_) at_ = x + static_cast<int64_t>(pairs_[lane / 16]) * p.k;
  }
  __device__ __forceinline__ void copy(uint4* target, const Part& p, const T* x, int lane) {
    const int chunk = lane % 16, row = lane / 16;
    if (row < count_) cp_async16(target + chunk_of(row, chunk), at_ + column_, column_ < p.k);
    for (int other = row + 2; other < count_; other += 2) {
      const T* const source = x + static_cast<int64_t>(pairs_[other]) * p.k + column_;
      cp_async16(target + chunk_of(other, chunk), source, column_ < p.k);
    }
    column_ += kUnitCols;
  }

 private:
  const T* at_;
  const int* pairs_;
  int count_, column_;
};

// This lane's 8 columns of each 32 of a unit. Columns of the tensor core that no row has get the last row once more.
__device__ __forceinline__ void load_rows(Activations<1, kUnitCols>& x, const uint4* rows, int count, int lane) {
  const int row = min(lane / 4, count - 1);
#pragma unroll
  for (int h = 0; h < kUnitCols / 32; ++h) x.half_tile[0][h] = rows[chunk_of(row, 4 * h + lane % 4)];
}

// The sums of a round's chains in shared memory: [pair][chain][output of the block].
template <int kTiles>
struct Partials {
  float* sums;
  int chains;

  // Four more floats: the columns 2t of a fragment go to different banks.
  static __host__ __device__ __forceinline__ int pitch(int chains) { return chains * kTiles * 16 + 4; }

  __device__ __forceinline__ void store(const float (&acc)[kTiles][1][4], int first_pair, int count, int chain,
                                        int lane) const {
#pragma unroll
    for (int j = 0; j < kTiles * 4; ++j) {
      const int i = j % 4, column = 2 * (lane % 4) + i % 2, out = j / 4 * 16 + lane / 4 + 8 * (i / 2);
      if (column < count) sums[(first_pair + column) * pitch(chains) + chain * kTiles * 16 + out] = acc[j / 4][0][i];
    }
  }
  __device__ __forceinline__ float total(int pair, int out) const {
    const float* source = sums + pair * pitch(chains) + out;
    float sum = 0.0f;
#pragma unroll
    for (int chain = 0; chain < kMaxChains; ++chain) {
      if (chain < chains) sum += source[chain * kTiles * 16];
    }
    return sum;
  }
};

// A CTA's shared memory: this, the warps' rings, partial sums, then what else a kernel wants.
template <typename W, int kTiles, int kWarps, int kStages>
struct alignas(16) Memory {
  using Stage = typename W::template Stage<kTiles>;
  Slots slots;

  static __host__ __device__ __forceinline__ int stage_bytes(int slot_pairs) {
    return static_cast<int>(sizeof(Stage)) + slot_pairs * kUnitCols * 2;
  }
  static __host__ __device__ __forceinline__ int partial_floats(const Part& p, int pairs) {
    return min(pairs, kRoundPairs) * Partials<kTiles>::pitch(p.chains);
  }
  static int bytes(const Part& p, int pairs, int slot_pairs) {
    return static_cast<int>(sizeof(Memory)) + kWarps * kStages * stage_bytes(slot_pairs) + 4 * partial_floats(p, pairs);
  }
  // In the rings' memory, which is larger; they are filled afterwards.
  __device__ __forceinline__ SlotScratch& scratch() { return *reinterpret_cast<SlotScratch*>(this + 1); }
  __device__ __forceinline__ unsigned char* ring(int warp, int slot_pairs) {
    return reinterpret_cast<unsigned char*>(this + 1) + warp * kStages * stage_bytes(slot_pairs);
  }
  __device__ __forceinline__ float* partials(int slot_pairs) {
    return reinterpret_cast<float*>(ring(kWarps, slot_pairs));
  }
};

// A warp's ring.
template <typename W, int kTiles, int kWarps, int kStages>
class Ring {
 public:
  using T = typename W::T;
  using Stage = typename W::template Stage<kTiles>;

  __device__ __forceinline__ Ring(Memory<W, kTiles, kWarps, kStages>& memory, const Part& p, const T* x, int row_tile,
                                  int tile_step, int first_slot, int end_slot, int slot_pairs)
      : slots_(memory.slots),
        p_(p),
        x_(x),
        ring_(memory.ring(threadIdx.x / 32, slot_pairs)),
        stage_bytes_(memory.stage_bytes(slot_pairs)),
        end_slot_(end_slot),
        lane_(threadIdx.x % 32),
        weights_at_(p, first_slot),
        rows_at_(weights_at_),
        weights_(p, row_tile, tile_step, lane_) {
    start_weights();
  }

  __device__ __forceinline__ Stage& stage(int i) const { return *reinterpret_cast<Stage*>(ring_ + i * stage_bytes_); }
  __device__ __forceinline__ uint4* rows(int i) const { return reinterpret_cast<uint4*>(&stage(i) + 1); }

  __device__ __forceinline__ void copy_weights(int i) {
    if (weights_at_.slot >= end_slot_) return;
    weights_.copy(stage(i), p_, lane_);
    if (weights_at_.advance(p_)) start_weights();
  }
  // Once before the first copy_rows().
  __device__ __forceinline__ void start_rows() {
    if (rows_at_.slot < end_slot_) row_source_.start(p_, slots_, x_, rows_at_.slot, rows_at_.chain, lane_);
  }
  __device__ __forceinline__ void copy_rows(int i) {
    if (rows_at_.slot >= end_slot_) return;
    row_source_.copy(rows(i), p_, x_, lane_);
    if (rows_at_.advance(p_)) start_rows();
  }

 private:
  __device__ __forceinline__ void start_weights() {
    if (weights_at_.slot < end_slot_) weights_.start(p_, slots_.expert[weights_at_.slot], weights_at_.chain);
  }

  const Slots& slots_;
  const Part& p_;
  const T* x_;
  unsigned char* ring_;
  int stage_bytes_, end_slot_, lane_;
  Cursor<kWarps> weights_at_, rows_at_;
  Source<W, kTiles> weights_;
  RowSource<T> row_source_;
};

// Multiplies a CTA's slots, [first_slot, end_slot) of `memory.slots`, with the rows of x that they name. ready() is
// called once, before x is read and after the first weights are asked for; round(first, count, partials) for every
// round, of the pairs first .. first + count of slots.pairs, by all threads.
template <typename W, int kTiles, int kWarps, int kStages, typename Ready, typename Round>
__device__ __forceinline__ void multiply_slots(Memory<W, kTiles, kWarps, kStages>& memory, const Part& p,
                                               const typename W::T* x, int row_tile, int tile_step, int first_slot,
                                               int end_slot, int slot_pairs, Ready ready, Round round) {
  const Slots& slots = memory.slots;
  const int lane = threadIdx.x % 32;
  const Partials<kTiles> partials{memory.partials(slot_pairs), p.chains};
  Cursor<kWarps> now(p, first_slot);
  Ring<W, kTiles, kWarps, kStages> ring(memory, p, x, row_tile, tile_step, first_slot, end_slot, slot_pairs);
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) ring.copy_weights(s);
  ready();
  ring.start_rows();
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    ring.copy_rows(s);
    cp_async_commit();
  }
  float acc[kTiles][1][4] = {};
  int stage = 0;
  for (int begin = first_slot; begin < end_slot;) {
    const int first_pair = slots.begin[begin];
    const bool fits = begin + lane < end_slot && slots.begin[begin + lane + 1] - first_pair <= kRoundPairs;
    const int end = begin + __popc(__ballot_sync(0xffffffffu, fits));
    while (now.slot < end) {
      const int count = slots.size(now.slot);
      cp_async_wait<kStages - 2>();
      __syncwarp();  // all lanes' copies are there, and all have read the stage that is filled now
      const int last = stage == 0 ? kStages - 1 : stage - 1;
      ring.copy_weights(last);
      ring.copy_rows(last);
      cp_async_commit();
      Activations<1, kUnitCols> rows;
      load_rows(rows, ring.rows(stage), count, lane);
      GroupSums<W::kGroups, 1> sums;
      sums.template compute<typename W::T>(rows, W::kSumFactor);
#pragma unroll
      for (int r = 0; r < kTiles; ++r) W::multiply(acc[r], ring.stage(stage), r, rows, sums, lane);
      stage = stage + 1 == kStages ? 0 : stage + 1;
      const Cursor<kWarps> done = now;
      if (now.advance(p)) {
        partials.store(acc, slots.begin[done.slot] - first_pair, count, done.chain, lane);
#pragma unroll
        for (int j = 0; j < kTiles * 4; ++j) acc[j / 4][0][j % 4] = 0.0f;
      }
    }
    __syncthreads();
    round(first_pair, slots.begin[end] - first_pair, partials);
    begin = end;
    if (begin < end_slot) __syncthreads();
  }
}

}  // namespace hf_fastpath::moe
