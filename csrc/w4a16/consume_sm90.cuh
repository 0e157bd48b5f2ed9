// The consumers of w4a16_gemm_sm90.cu: expanding int4 in registers while wgmma runs.
#pragma once

#include "../common/dequant.cuh"
#include "../common/ptx_sm90.cuh"
#include "gemm.cuh"
#include "produce_sm90.cuh"

namespace hf_fastpath {

// What a lane needs to know of one group of its row tiles: rows g and g + 8.
template <int kRowTiles>
struct GroupValues {
  uint32_t zero[kRowTiles][2];   // zero_pair()
  uint32_t scale[kRowTiles][2];  // bits of one 16-bit float

  template <typename T, typename Stage>
  __device__ __forceinline__ void load(const Stage& stage, int group, bool has_zeros, int warp, int g) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row_tile = r * kGemmWarps + warp, row = g + 8 * h;
        scale[r][h] = stage.scales[row_tile][group][row];
        zero[r][h] = zero_pair<T>(has_zeros ? stage.zeros[row_tile][group][row] : 8);
      }
    }
  }
};

// The A fragments of 32 columns: two for each row tile.
template <typename T, bool kExact, int kRowTiles>
__device__ __forceinline__ void expand(uint32_t (&a)[kRowTiles][2][4], const uint4 (&words)[kRowTiles], int half,
                                       const GroupValues<kRowTiles>& values) {
  using P = typename Pair<T>::type;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    int4_fragment<T>(half ? words[r].z : words[r].x, values.zero[r][0], values.zero[r][1], a[r][0]);
    int4_fragment<T>(half ? words[r].w : words[r].y, values.zero[r][0], values.zero[r][1], a[r][1]);
    if constexpr (!kExact) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t scale = values.scale[r][i % 2];
        uint32_t& pair = a[r][i / 4][i % 4];
        pair = as_bits(__hmul2(as_pair<P>(pair), as_pair<P>(scale | scale << 16)));
      }
    }
  }
}

// Queues the products of 32 columns as one group of wgmma.
template <typename T, int kRowTiles, int kTokenTiles>
__device__ __forceinline__ void multiply(float (&acc)[kRowTiles][kTokenTiles][4], uint32_t (&a)[kRowTiles][2][4],
                                         uint64_t b, bool accumulate) {
#pragma unroll
  for (int i = 0; i < kRowTiles * 8; ++i) pin_register(a[i / 8][i / 4 % 2][i % 4]);
  wgmma_fence();
#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) wgmma_m64k16<T>(acc[r], a[r][j], b + 2 * j, accumulate || j);
  }
  wgmma_commit();
}

template <int kRowTiles, int kTokenTiles>
__device__ __forceinline__ void pin_registers(float (&acc)[kRowTiles][kTokenTiles][4]) {
#pragma unroll
  for (int i = 0; i < kRowTiles * kTokenTiles * 4; ++i) {
    pin_register(acc[i / (kTokenTiles * 4)][i / 4 % kTokenTiles][i % 4]);
  }
}

// acc += scale * sum
template <typename T, int kRowTiles, int kTokenTiles>
__device__ __forceinline__ void add_group(float (&acc)[kRowTiles][kTokenTiles][4],
                                          const float (&sum)[kRowTiles][kTokenTiles][4],
                                          const GroupValues<kRowTiles>& values) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    const float scale[2] = {bits_to_float<T>(values.scale[r][0]), bits_to_float<T>(values.scale[r][1])};
#pragma unroll
    for (int c = 0; c < kTokenTiles; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[r][c][i] = fmaf(sum[r][c][i], scale[i / 2], acc[r][c][i]);
    }
  }
}

// Exact: a group's products are summed on their own, and the sum is multiplied by the scale. Else the weights are
// multiplied by their scale, and rounded, before; that needs half the registers for sums.
template <typename T, int kGroup, int kRowTiles, int kTokenTiles, int kStages, bool kExact>
__device__ __forceinline__ void consume(Sm90Stage<kGroup, kRowTiles, kTokenTiles>* stages, uint64_t* full,
                                        uint64_t* empty, const GemmParams<T>& p, int cta, int thread) {
  constexpr int kHalves = kGroup / 32;  // runs of 32 columns of a group
  const int warp = thread / 32, lane = thread % 32, g = lane / 4;
  float acc[kRowTiles][kTokenTiles][4] = {};
  float sum[kExact ? kRowTiles : 1][kTokenTiles][4];  // of the group under way
  uint32_t a[2][kRowTiles][2][4];                     // one is filled while wgmma reads the other
  GroupValues<kRowTiles> values;
  Cursor now(p.schedule, cta);
  int stage = 0, phase = 0, held = -1;  // held: the stage before, which wgmma may still read
  const auto release = [&] {
    __syncwarp();
    if (held >= 0 && lane == 0) mbarrier_arrive(empty + held);
    held = -1;
  };
  while (now.left) {
    bool started = false, ended = false;
    while (!ended) {
      mbarrier_wait(full + stage, phase);
      const uint64_t b = wgmma_descriptor(stages[stage].x);
      uint4 words[kRowTiles];
#pragma unroll
      for (int half = 0; half < 4; ++half) {
        if (half % 2 == 0) {
#pragma unroll
          for (int r = 0; r < kRowTiles; ++r) words[r] = stages[stage].weights[r * kGemmWarps + warp][half / 2][lane];
        }
        if (half % kHalves == 0) values.template load<T>(stages[stage], half / kHalves, p.zeros != nullptr, warp, g);
        expand<T, kExact>(a[half % 2], words, half % 2, values);
        const uint64_t at = b + half / 2 * (sizeof(stages->x[0]) >> 4) + half % 2 * 4;
        const bool group_ends = kExact && (half + 1) % kHalves == 0;
        if constexpr (kExact) {
          multiply<T>(sum, a[half % 2], at, half % kHalves != 0);
        } else {
          multiply<T>(acc, a[half % 2], at, started);
          started = true;
        }
        if (group_ends) {
          wgmma_wait<0>();
        } else {
          wgmma_wait<1>();
        }
        if (half == 0) release();
        if constexpr (kExact) {
          if (!group_ends) continue;
          pin_registers(sum);
          add_group<T>(acc, sum, values);
        }
      }
      held = stage;
      if (++stage == kStages) stage = 0, phase ^= 1;
      ended = now.ends_tile(p.schedule);
      if (!ended) now.advance(p.schedule);
    }
    wgmma_wait<0>();
    release();
    if constexpr (!kExact) pin_registers(acc);
    store_tile(acc, p, now, cta, thread);
    if constexpr (kExact) {
#pragma unroll
      for (int i = 0; i < kRowTiles * kTokenTiles * 4; ++i) acc[i / (kTokenTiles * 4)][i / 4 % kTokenTiles][i % 4] = 0;
    }
    now.advance(p.schedule);
  }
}

}  // namespace hf_fastpath
