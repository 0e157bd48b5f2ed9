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

// What a lane holds of a stage's weights: its words of each packed tile, the scales and zeros of rows g and g + 8.
template <typename Scales, typename Stage, int kGroup>
struct PackedWeights {
  uint4 words[Stage::kTiles];
  Scales groups[Stage::kGroups];

  __device__ __forceinline__ void load(const Stage& stage, bool has_zeros, int warp, int lane) {
#pragma unroll
    for (int i = 0; i < Stage::kTiles; ++i) words[i] = stage.weights[warp][i][lane];
#pragma unroll
    for (int i = 0; i < Stage::kGroups; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        groups[i].scales[h] = stage.scales[warp][i][lane / 4 + 8 * h];
        groups[i].zeros[h] = has_zeros ? stage.zeros[warp][i][lane / 4 + 8 * h] : 8;
      }
    }
  }

  // To what expand() wants; apart from load(), since it waits for the loads. All tiles at once: an exchange takes long.
  __device__ __forceinline__ void prepare(int lane) {
#pragma unroll
    for (int i = 0; i < Stage::kTiles; ++i) {
      transpose_pairs(words[i].x, words[i].y, lane);
      transpose_pairs(words[i].z, words[i].w, lane);
    }
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
  StageCursor now(s, cta, 2 / kTiles);
  int stage = 0, phase = 0;
  const auto release = [&](int done) {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(empty + done);
  };
  const auto load = [&] {
    mbarrier_wait(full + stage, phase);
    weights.load(stages[stage], has_zeros && !kSymmetric, warp, lane);
  };
  load();
  while (!now.done(s)) {
    const int tile = now.tile;
    for (bool started = false, ended = false; !ended; started = true) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int col_tile = half % kTiles, current = stage;
        if (col_tile == 0) weights.prepare(lane);
        weights.expand_tile(a[half], col_tile);
        multiply_tile<T>(acc, a[half], wgmma_descriptor(stages[stage].x[col_tile]), started || half);
        if (col_tile == kTiles - 1) {
          ended = now.advance(s);
          if (++stage == kStages) stage = 0, phase ^= 1;
          if (half == 0 || !now.done(s)) load();  // before the wait, so that the next words are there when wgmma is
        }
        wgmma_wait<1>();
        if (col_tile == 0 && (started || half)) release(current == 0 ? kStages - 1 : current - 1);
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
