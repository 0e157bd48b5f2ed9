// The products of a mixture's packed experts for a few rows of x: what both of moe_experts.cu's kernels share.
//
// K is cut into at most eight chains of whole units, whose sums are added in the order of K. What a chain is depends on
// K alone: a row's bits do not depend on the other rows, on the warps or on the GPU's size. A warp has a ring of
// weights under way in shared memory that it fills and empties alone (common/decode_linear.cuh).
//
// multiply_slots(): a CTA takes one block of an expert's outputs, kTiles tiles of 16 of them, for its share of the
// slots (slots.cuh). A chain of a slot is a task, and the CTA's warps take the tasks in turn. Chains' sums meet in
// shared memory once the slots of a round are done. For multiply_whole_slots(), of whole_slots.cuh, a block of a slot
// is a task.
#pragma once

#include "../common/int4_weights.cuh"
#include "../common/launch.cuh"
#include "slots.cuh"

namespace hf_fastpath::moe {

using linear::Activations;
using linear::GroupSums;

constexpr int kBlockCols = 128;  // of a weight format's stage
constexpr int kUnitCols = 256;   // two of them: what a task has beside its products counts as much as they do
constexpr int kUnitBlocks = kUnitCols / kBlockCols;
constexpr int kMaxChains = 8;
constexpr int kRoundPairs = 64;  // whose sums shared memory has room for, where the GPU has that; at least kSlotPairs

// The experts' packed weights of one product (packing.py), one after the other.
struct Part {
  const unsigned char* qweight;
  const unsigned char* scales;
  const unsigned char* zeros;
  int k, row_tiles, col_tiles, groups;  // of an expert
  int units, chain_units, chains;
  int round_pairs;  // of multiply_slots()
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
          (units + chain_units - 1) / chain_units,
          kSlotPairs};
}

// Whether units are whole and each chain has one: what the kernels for that leave out is a sixth of their instructions.
inline bool is_plain(const Part& p) {
  return p.k % kUnitCols == 0 && p.chain_units == 1;
}

// A warp's way through its tasks, which are kWarps apart, and through the units of each.
template <bool kPlain, int kWarps>
struct Cursor {
  int slot, chain, unit;  // unit: of the chain

  __device__ __forceinline__ Cursor(const Part& p, int first_slot)
      : slot(first_slot), chain(threadIdx.x / 32), unit(0) {
    settle(p);
  }
  __device__ __forceinline__ int unit_of_k(const Part& p) const {
    return kPlain ? chain : chain * p.chain_units + unit;
  }
  // Returns whether that leads to another task.
  __device__ __forceinline__ bool advance(const Part& p) {
    if (!kPlain && ++unit < min(p.chain_units, p.units - chain * p.chain_units)) return false;
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

template <typename W, int kTiles>
struct Stage {
  typename W::template StageOf<kTiles> block[kUnitBlocks];
};

// Fills stages of the ring: of each block lane l copies 16 bytes of each tile, and 16 bytes of scales or zeros.
template <typename W, int kTiles, bool kPlain>
class Source {
 public:
  using Block = typename W::template StageOf<kTiles>;

  // tile_step: row tiles from one of the CTA's tiles to the next.
  __device__ __forceinline__ Source(const Part& p, int row_tile, int tile_step, int lane)
      : tiles_(p.qweight + static_cast<int64_t>(row_tile) * p.col_tiles * 512 + lane * 16),
        tile_bytes_(tile_step * p.col_tiles * 512),
        expert_tiles_(static_cast<int64_t>(p.row_tiles) * p.col_tiles * 512) {
    constexpr int kScaleLanes = 2 * kTiles * W::kGroups, kZeroLanes = W::kHasZeros ? kTiles * W::kGroups : 0;
    static_assert(kScaleLanes + kZeroLanes <= 32);
    const bool scales = lane < kScaleLanes;
    const int piece = scales ? lane : lane - kScaleLanes, pieces = scales ? 2 : 1;  // 16 bytes each, pieces: a group's
    const int tile = piece / (pieces * W::kGroups), within = piece % (pieces * W::kGroups);
    has_value_ = lane < kScaleLanes + kZeroLanes;
    group_ = within / pieces;
    block_values_ = W::kGroups * 16 * pieces;
    const int64_t first = static_cast<int64_t>(row_tile + tile * tile_step) * p.groups * 16 * pieces;
    values_ = (scales ? p.scales : p.zeros) + first + within * 16;
    expert_values_ = static_cast<int64_t>(p.row_tiles) * p.groups * 16 * pieces;
    target_ = static_cast<int>(offsetof(Block, scales)) + lane * 16;
    if (!scales) target_ = static_cast<int>(offsetof(Block, zeros)) + piece * 16;
  }

  // What is not there, a tail of K, becomes 0 and is not read.
  __device__ __forceinline__ void copy(Stage<W, kTiles>& stage, const Part& p, int expert, int unit, int lane) const {
    const unsigned char* const tiles = tiles_ + expert * expert_tiles_ + unit * (kUnitCols * 8);
    const unsigned char* const values = values_ + expert * expert_values_ + unit * kUnitBlocks * block_values_;
#pragma unroll
    for (int b = 0; b < kUnitBlocks; ++b) {
#pragma unroll
      for (int r = 0; r < kTiles; ++r) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const bool there = kPlain || 2 * (unit * kUnitBlocks + b) + c < p.col_tiles;
          cp_async16(&stage.block[b].tile[r][c][lane], tiles + r * tile_bytes_ + 1024 * b + 512 * c, there);
        }
      }
      if (has_value_) {
        const bool there = kPlain || (unit * kUnitBlocks + b) * W::kGroups + group_ < p.groups;
        cp_async16(reinterpret_cast<unsigned char*>(&stage.block[b]) + target_, values + b * block_values_, there);
      }
    }
  }

 private:
  const unsigned char* tiles_;
  const unsigned char* values_;
  int tile_bytes_;
  int64_t expert_tiles_, expert_values_;
  int group_, block_values_, target_;
  bool has_value_;
};

// This lane's 8 columns of each 32 of a block.
template <bool kPlain, typename T>
__device__ __forceinline__ void load_row(Activations<1, kBlockCols>& x, const T* row, int column, int k) {
#pragma unroll
  for (int h = 0; h < kBlockCols / 32; ++h) {
    const bool there = kPlain || column + 32 * h < k;
    x.half_tile[0][h] = there ? load_early16(row + column + 32 * h) : make_uint4(0, 0, 0, 0);
  }
}

// This lane's part of its row of a slot's, from a unit of K on. Columns that no row has get the last one once more.
template <typename T>
__device__ __forceinline__ const T* row_of_slot(const Slots& slots, int slot, const T* x, const Part& p, int unit,
                                                int lane) {
  const int own = min(lane / 4, slots.size(slot) - 1);
  return x + static_cast<int64_t>(slots.rows[slots.begin[slot] + own]) * p.k + 8 * (lane % 4) + unit * kUnitCols;
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

// A CTA's shared memory: this, partial sums, then what else a kernel wants.
template <typename W, int kTiles, int kWarps, int kStages>
struct alignas(16) Memory {
  Stage<W, kTiles> ring[kWarps][kStages];
  Slots slots;

  // In the rings' memory, which is larger; they are filled afterwards.
  __device__ __forceinline__ SlotScratch& scratch() { return *reinterpret_cast<SlotScratch*>(ring); }
  __device__ __forceinline__ float* partials() { return reinterpret_cast<float*>(this + 1); }
  static __host__ __device__ __forceinline__ int partial_floats(const Part& p) {
    return p.round_pairs * Partials<kTiles>::pitch(p.chains);
  }
  static int bytes(const Part& p) { return static_cast<int>(sizeof(Memory)) + 4 * partial_floats(p); }
  // As large rounds as there are pairs or the GPU has memory for, beside `more` bytes.
  static void set_round(Part& p, int pairs, int more) {
    const int room = max_shared_bytes() - static_cast<int>(sizeof(Memory)) - more;
    p.round_pairs = room / (4 * Partials<kTiles>::pitch(p.chains));
    p.round_pairs = std::max(kSlotPairs, std::min({p.round_pairs, pairs, kRoundPairs}));
  }
};

// Multiplies a CTA's slots, [first_slot, end_slot) of `memory.slots`, with the rows of x that they name. ready() is
// called once, before x is read and after the first weights are asked for; round(first, count, partials) for every
// round, of the pairs first .. first + count of slots.pairs, by all threads.
template <bool kPlain, typename W, int kTiles, int kWarps, int kStages, typename Ready, typename Round>
__device__ __forceinline__ void multiply_slots(Memory<W, kTiles, kWarps, kStages>& memory, const Part& p,
                                               const typename W::T* x, int row_tile, int tile_step, int first_slot,
                                               int end_slot, Ready ready, Round round) {
  using T = typename W::T;
  const Slots& slots = memory.slots;
  const int lane = threadIdx.x % 32;
  const Partials<kTiles> partials{memory.partials(), p.chains};
  auto* const ring = memory.ring[threadIdx.x / 32];
  Cursor<kPlain, kWarps> now(p, first_slot), ahead = now;
  const Source<W, kTiles, kPlain> source(p, row_tile, tile_step, lane);
  const auto copy = [&](int stage) {
    if (ahead.slot < end_slot) {
      source.copy(ring[stage], p, slots.expert[ahead.slot], ahead.unit_of_k(p), lane);
      ahead.advance(p);
    }
    cp_async_commit();
  };
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) copy(s);
  ready();
  Activations<1, kBlockCols> rows[kUnitBlocks];
  const auto row_at = [&](const Cursor<kPlain, kWarps>& at) {
    return row_of_slot(slots, at.slot, x, p, at.unit_of_k(p), lane);
  };
  const auto load = [&](int b, const T* row, int unit) {
    load_row<kPlain>(rows[b], row + b * kBlockCols, 0, p.k - (unit * kUnitBlocks + b) * kBlockCols);
  };
  if (now.slot < end_slot) {
    const T* const row = row_at(now);
#pragma unroll
    for (int b = 0; b < kUnitBlocks; ++b) load(b, row, now.unit_of_k(p));
  }
  float acc[kTiles][1][4] = {};
  int stage = 0;
  for (int begin = first_slot; begin < end_slot;) {
    const int first_pair = slots.begin[begin];
    const bool fits = begin + lane < end_slot && slots.begin[begin + lane + 1] - first_pair <= p.round_pairs;
    const int end = begin + __popc(__ballot_sync(0xffffffffu, fits));
    while (now.slot < end) {
      const Cursor<kPlain, kWarps> done = now;
      const bool ended = now.advance(p), more = now.slot < end_slot;
      const T* row = nullptr;
      if (more) row = row_at(now);
      cp_async_wait<kStages - 2>();
      __syncwarp();  // all lanes' copies are there, and all have read the stage that is filled now
      copy(stage == 0 ? kStages - 1 : stage - 1);
#pragma unroll
      for (int b = 0; b < kUnitBlocks; ++b) {
        linear::prepare<W, 1>(rows[b]);
        GroupSums<W::kGroups, 1> sums;
        sums.template compute<T>(rows[b], W::kSumFactor);
#pragma unroll
        for (int r = 0; r < kTiles; ++r) W::multiply(acc[r], ring[stage].block[b], r, rows[b], sums, lane);
        if (more) load(b, row, now.unit_of_k(p));
      }
      stage = stage + 1 == kStages ? 0 : stage + 1;
      if (ended) {
        partials.store(acc, slots.begin[done.slot] - first_pair, slots.size(done.slot), done.chain, lane);
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
