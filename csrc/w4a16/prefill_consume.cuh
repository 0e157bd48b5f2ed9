// The consumers of w4a16_prefill_sm90.cu: expanding int4 in registers while wgmma runs, and storing tiles.
#pragma once

#include "../common/dequant.cuh"
#include "../common/ptx_sm90.cuh"
#include "gemm.cuh"
#include "prefill_produce.cuh"

namespace hf_fastpath {

// What a lane holds of a stage's weights: the words of its row tiles, the scales and zeros of rows g and g + 8.
template <typename T, int kGroup, int kRowTiles, int kTokenTiles>
struct PackedWeights {
  using Stage = PrefillStage<kGroup, kRowTiles, kTokenTiles>;
  uint4 words[kRowTiles];
  uint2 scales[kRowTiles][Stage::kGroups], zeros[kRowTiles][Stage::kGroups];

  __device__ __forceinline__ void load(const Stage& stage, bool has_zeros, int warp, int lane) {
    constexpr uint32_t kSymmetric = kIntegerBase<T> | 0x00080008;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const int tile = r * kGemmWarps + warp;
      words[r] = stage.weights[tile][lane];
#pragma unroll
      for (int i = 0; i < Stage::kGroups; ++i) {
        scales[r][i] = stage.scales[tile][i][lane / 4];
        zeros[r][i] = has_zeros ? stage.zeros[tile][i][lane / 4] : make_uint2(kSymmetric, kSymmetric);
      }
    }
  }

  // The A fragments of 16 columns: (q - zero) * scale, rounded as w4a16_dequantize rounds.
  __device__ __forceinline__ void expand(uint32_t (&a)[kRowTiles][4], int step) const {
    using P = typename Pair<T>::type;
    const int group = step * 16 / kGroup;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const uint4& w = words[r];
      const uint32_t word = step == 0 ? w.x : step == 1 ? w.y : step == 2 ? w.z : w.w;
      int4_fragment<T>(word, zeros[r][group].x, zeros[r][group].y, a[r]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t scale = i % 2 ? scales[r][group].y : scales[r][group].x;
        a[r][i] = as_bits(__hmul2(as_pair<P>(a[r][i]), as_pair<P>(scale)));
      }
    }
  }
};

// Queues the products of kSteps * 16 columns as one group of wgmma.
template <typename T, int kSteps, int kRowTiles, int kTokenTiles>
__device__ __forceinline__ void multiply_steps(float (&acc)[kRowTiles][kTokenTiles][4],
                                               uint32_t (&a)[kSteps][kRowTiles][4], uint64_t b, bool accumulate) {
#pragma unroll
  for (int i = 0; i < kSteps * kRowTiles * 4; ++i) pin_register(a[i / (kRowTiles * 4)][i / 4 % kRowTiles][i % 4]);
  wgmma_fence();
#pragma unroll
  for (int j = 0; j < kSteps; ++j) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) wgmma_m64k16<T>(acc[r], a[j][r], b + 2 * j, accumulate || j);
  }
  wgmma_commit();
}

// Two stores of tiles: by the engine that copies boxes, from shared memory; or straight from registers.
template <int kRowTiles, int kTokenTiles>
struct __align__(1024) OutputBuffer {
  unsigned char rows[kRowTiles][kGemmWarps / 4][8 * kTokenTiles][128];  // 64 outputs of each token, swizzled
};

template <typename T, int kRowTiles, int kTokenTiles>
__device__ __forceinline__ void store_boxes(const float (&acc)[kRowTiles][kTokenTiles][4],
                                            OutputBuffer<kRowTiles, kTokenTiles>& buffer,
                                            const PrefillParams<T>& params, const Place& place, int thread) {
  const GemmParams<T>& p = params.gemm;
  const int warp = thread / 32, lane = thread % 32, warpgroup = warp / 4;
  const bool leads = thread % 128 == 0;
  if (leads) tensor_stores_read();
  warpgroup_barrier(1 + warpgroup);
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    float bias[2] = {};
    const int row = ((place.row_block * kRowTiles + r) * kGemmWarps + warp) * 16 + lane / 4;
    if (p.bias && row < p.n) bias[0] = to_float(p.bias[row]);
    if (p.bias && row + 8 < p.n) bias[1] = to_float(p.bias[row + 8]);
    const int token = lane / 16 * 8 + lane % 8, chunk = warp % 4 * 2 + lane / 8 % 2;  // that the lane stores
    unsigned char* target = &buffer.rows[r][warpgroup][token][(chunk ^ token % 8) * 16];
#pragma unroll
    for (int c = 0; c < kTokenTiles; c += 2) {
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&part)[4] = acc[r][c + i / 2];
        const int h = i % 2;
        pairs[i] = pack_floats(part[2 * h] + bias[h], part[2 * h + 1] + bias[h], T());
      }
      store_transposed_8x8x4(target + c * 8 * 128, pairs);
    }
  }
  fence_proxy_async();
  warpgroup_barrier(1 + warpgroup);
  if (!leads) return;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    const int column = ((place.row_block * kRowTiles + r) * kGemmWarps + 4 * warpgroup) * 16;
    tensor_store(params.y, place.token_block * 8 * kTokenTiles, column, buffer.rows[r][warpgroup]);
  }
}

// kSteps: runs of 16 columns that are one group of wgmma; while it runs, the next group's weights are expanded.
template <int kSteps, typename T, int kGroup, int kRowTiles, int kTokenTiles, int kStages>
__device__ __forceinline__ void consume(PrefillStage<kGroup, kRowTiles, kTokenTiles>* stages,
                                        OutputBuffer<kRowTiles, kTokenTiles>& buffer, uint64_t* full, uint64_t* empty,
                                        const PrefillParams<T>& params, int cta, int thread) {
  constexpr int kOfStage = kStageCols / 16 / kSteps;  // groups
  const GemmParams<T>& p = params.gemm;
  const int warp = thread / 32, lane = thread % 32;
  float acc[kRowTiles][kTokenTiles][4];
  uint32_t a[2][kSteps][kRowTiles][4];  // one is filled while wgmma reads the other
  PackedWeights<T, kGroup, kRowTiles, kTokenTiles> weights;
  Cursor now(p.schedule, cta);
  int stage = 0, phase = 0, held = -1;  // held: the stage before, which wgmma may still read
  const auto release = [&] {
    __syncwarp();
    if (held >= 0 && lane == 0) mbarrier_arrive(empty + held);
    held = -1;
  };
  const auto load = [&] {
    mbarrier_wait(full + stage, phase);
    weights.load(stages[stage], p.zeros != nullptr, warp, lane);
  };
  if (now.left) load();
  while (now.left) {
    bool started = false, ended = false;
    while (!ended) {
      ended = now.ends_tile(p.schedule);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint64_t b = wgmma_descriptor(stages[stage].x);
#pragma unroll
        for (int i = 0; i < kOfStage; ++i) {
          uint32_t (&fragments)[kSteps][kRowTiles][4] = a[(half * kOfStage + i) % 2];
#pragma unroll
          for (int j = 0; j < kSteps; ++j) weights.expand(fragments[j], i * kSteps + j);
          multiply_steps<T, kSteps>(acc, fragments, b + 2 * kSteps * i, started);
          started = true;
          const int current = stage;
          if (i == kOfStage - 1) {  // before the wait, so that the next stage's words are there when wgmma is
            if (++stage == kStages) stage = 0, phase ^= 1;
            if (half == 0 || now.left > 1) load();
          }
          wgmma_wait<1>();
          if (i == 0) release();
          if (i == kOfStage - 1) held = current;
        }
      }
      if (!ended) now.advance(p.schedule);
    }
    wgmma_wait<0>();
    release();
#pragma unroll
    for (int i = 0; i < kRowTiles * kTokenTiles * 4; ++i) {
      pin_register(acc[i / (kTokenTiles * 4)][i / 4 % kTokenTiles][i % 4]);
    }
    if (params.y_mapped && now.did_all(p.schedule)) {
      store_boxes(acc, buffer, params, p.schedule.place(now.tile), thread);
    } else {
      store_tile(acc, p, now, cta, thread);
    }
    now.advance(p.schedule);
  }
  if (thread % 128 == 0) tensor_stores_read();  // before the buffer is gone
}

}  // namespace hf_fastpath
