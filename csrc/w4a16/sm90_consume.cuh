// The warps of w4a16_gemm_sm90.cu that multiply: int4 is expanded in registers while wgmma runs.
#pragma once

#include "../common/ptx_sm90.cuh"
#include "gemm.cuh"
#include "sm90_expand.cuh"
#include "sm90_stage.cuh"

namespace hf_fastpath {

// The packed layout gives a lane eight neighbouring columns of a run of 32; wgmma wants lane t to have columns 2t and
// 2t + 1 of each eight, as x has them. This exchanges pairs of columns within each four lanes: bytes 0 and 2 of a word
// are one pair of both rows, bytes 1 and 3 the next one.
__device__ __forceinline__ void transpose_pairs(uint32_t& left, uint32_t& right, int lane) {
  const uint32_t merge = lane % 2 ? 0x3715 : 0x6240;
  left = __byte_perm(left, __shfl_xor_sync(0xffffffffu, left, 1), merge);
  right = __byte_perm(right, __shfl_xor_sync(0xffffffffu, right, 1), merge);
  const bool upper = lane & 2;
  const uint32_t other = __shfl_xor_sync(0xffffffffu, upper ? left : right, 2);
  (upper ? left : right) = other;
}

constexpr int kSteps = 4;  // products of a packed tile, one group of wgmma

// What a lane holds of a stage's weights: its words of each packed tile, and what its groups take of rows g and g + 8.
template <typename Scales, typename Stage, int kGroup>
struct PackedWeights {
  uint4 words[Stage::kTiles];
  Scales groups[Stage::kGroups];

  __device__ __forceinline__ void load_tile(const Stage& stage, int tile, int warp, int lane) {
    words[tile] = stage.weights[warp][tile][lane];
  }
  // To what expand_tile() wants; apart from load_tile(), since it waits for the load.
  __device__ __forceinline__ void prepare_tile(int tile, int lane) {
    transpose_pairs(words[tile].x, words[tile].y, lane);
    transpose_pairs(words[tile].z, words[tile].w, lane);
  }
  __device__ __forceinline__ void load_groups(const Stage& stage, bool has_zeros, int warp, int lane) {
#pragma unroll
    for (int i = 0; i < Stage::kGroups; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        groups[i].scales[h] = stage.scales[warp][i][lane / 4 + 8 * h];
        groups[i].zeros[h] = has_zeros ? stage.zeros[warp][i][lane / 4 + 8 * h] : 8;
      }
    }
  }
  __device__ __forceinline__ void prepare_groups() {
#pragma unroll
    for (int i = 0; i < Stage::kGroups; ++i) groups[i].prepare();
  }

  // The A fragments of a packed tile.
  __device__ __forceinline__ void expand_tile(uint32_t (&a)[kSteps][4], int tile) const {
    const uint32_t steps[kSteps] = {words[tile].x, words[tile].y, words[tile].z, words[tile].w};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) expand(a[step], steps[step], groups[(64 * tile + 16 * step) / kGroup]);
  }
};

// Queues the products of a packed tile as one group of wgmma.
template <typename T, int kTokenTiles>
__device__ __forceinline__ void multiply_tile(float (&acc)[kTokenTiles][4], uint32_t (&a)[kSteps][4], uint64_t b,
                                              bool accumulate) {
#pragma unroll
  for (int i = 0; i < kSteps * 4; ++i) pin_register(a[i / 4][i % 4]);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    wgmma_m64k16<T>(acc, a[step], b + 2 * step, accumulate || step);
  }
  wgmma_commit();
}

// For a CTA that has at least one tile. store_tile(acc, tile) is called for each, and may change nothing in the ring.
template <typename T, int kGroup, int kTokenTiles, int kStages, bool kSymmetric, typename Schedule, typename StoreTile>
__device__ __forceinline__ void consume(float (&acc)[kTokenTiles][4], Sm90Stage<kGroup, kTokenTiles>* stages,
                                        uint64_t* full, uint64_t* empty, bool has_zeros, const Schedule& s, int cta,
                                        int warp, int lane, StoreTile store_tile) {
  constexpr int kTiles = kColTiles<kTokenTiles>;
  uint32_t a[2][kSteps][4];  // one is filled while wgmma reads the other
  using Scales = GroupScales<T, kSymmetric>;
  PackedWeights<Scales, Sm90Stage<kGroup, kTokenTiles>, kGroup> weights;
  const StageCursor first(s, cta, 2 / kTiles);
  const int steps = first.end - first.begin;
  int left = steps * ((s.count() - first.tile + s.clusters - 1) / s.clusters);  // stages of all tiles
  int stage = 0, phase = 0;
  const auto release = [&](int done) {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(empty + done);
  };
  const bool reads_zeros = has_zeros && !kSymmetric;
  mbarrier_wait(full, 0);
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    weights.load_tile(stages[0], i, warp, lane);
    weights.prepare_tile(i, lane);
  }
  weights.load_groups(stages[0], reads_zeros, warp, lane);
  weights.prepare_groups();
  for (int tile = first.tile; left > 0; tile += s.clusters) {
    for (int step = 0; step < steps;) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int col_tile = half % kTiles, next = stage + 1 == kStages ? 0 : stage + 1;
        const bool started = half || step;
        weights.expand_tile(a[half], col_tile);
        multiply_tile<T>(acc, a[half], wgmma_descriptor(stages[stage].x[col_tile]), started);
        __syncwarp();  // so that the compiler leaves the products together, and what follows behind them
        // What is expanded makes room for the next stage's words, so that these are on their way from shared memory and
        // among lanes while wgmma runs and the other tile is expanded.
        if (col_tile == 0 && --left) mbarrier_wait(full + next, next ? phase : phase ^ 1);
        if (left) {
          weights.load_tile(stages[next], col_tile, warp, lane);
          if (col_tile == kTiles - 1) weights.load_groups(stages[next], reads_zeros, warp, lane);
        }
        wgmma_wait<1>();
        if (col_tile == 0 && started) release(stage == 0 ? kStages - 1 : stage - 1);
        weights.prepare_tile(col_tile, lane);
        if (col_tile == kTiles - 1) {
          weights.prepare_groups();
          if (!next) phase ^= 1;
          stage = next;
          ++step;
        }
      }
    }
    wgmma_wait<0>();
    release(stage == 0 ? kStages - 1 : stage - 1);
#pragma unroll
    for (int i = 0; i < kTokenTiles * 4; ++i) {
      pin_register(acc[i / 4][i % 4]);
      acc[i / 4][i % 4] *= Scales::kUnit;
    }
    store_tile(acc, tile);
  }
}

}  // namespace hf_fastpath
