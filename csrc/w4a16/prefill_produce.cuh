// The producers of w4a16_prefill_sm90.cu: what a stage holds, and how it gets there.
#pragma once

#include "../common/dequant.cuh"
#include "../common/memory.cuh"
#include "../common/ptx_sm90.cuh"
#include "gemm.cuh"

namespace hf_fastpath {

constexpr int kPrefillProducerThreads = 128, kPrefillProducerWarps = kPrefillProducerThreads / 32;
constexpr int kStageCols = 64;  // one packed tile; two stages are a unit
// Arrivals that fill a stage: of each warp's weights, and one that tells how much of x to wait for.
constexpr int kPrefillFillArrivals = kPrefillProducerWarps + 1;

template <typename T>
struct PrefillParams {
  GemmParams<T> gemm;
  TensorMap x, y;
  bool x_mapped, y_mapped;  // else x is loaded, or y stored, by ordinary instructions
};

// A pair of a scale or zero point for row g of a tile, and one for row g + 8.
template <int kGroup, int kRowTiles, int kTokenTiles>
struct __align__(1024) PrefillStage {
  static constexpr int kTiles = kRowTiles * kGemmWarps, kGroups = kGroup < kStageCols ? kStageCols / kGroup : 1;
  static constexpr int kBytesOfX = 8 * kTokenTiles * 128;
  unsigned char x[8 * kTokenTiles][128];  // the B operand of wgmma_descriptor()
  uint4 weights[kTiles][32];              // a word is the A fragment of 16 neighbouring columns
  uint2 scales[kTiles][kGroups][8];
  uint2 zeros[kTiles][kGroups][8];  // zero_pair()
};

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

// What a thread holds of the weights, scales and zeros of one stage, on their way from global to shared memory.
template <typename T, int kGroup, int kRowTiles>
struct HeldWeights {
  static constexpr int kTiles = kRowTiles * kGemmWarps, kGroups = kGroup < kStageCols ? kStageCols / kGroup : 1;
  static constexpr int kOfWarp = kTiles / kPrefillProducerWarps;
  static constexpr int kPairs = kTiles * kGroups * 8;  // of scales
  static constexpr int kOfThread = (kPairs + kPrefillProducerThreads - 1) / kPrefillProducerThreads;
  uint4 words[kOfWarp];
  uint16_t scales[kOfThread][2];  // of rows g and g + 8; joined in store(), since to join them is to wait for them
  uint8_t zeros[kOfThread][2];

  __device__ __forceinline__ void load(const GemmParams<T>& p, int row_block, int col_tile, int thread) {
    const int lane = thread % 32, warp = thread / 32;
    const int64_t column = min(col_tile, p.col_tiles - 1);
#pragma unroll
    for (int i = 0; i < kOfWarp; ++i) {
      const int64_t tile = min(row_block * kTiles + i * kPrefillProducerWarps + warp, p.row_tiles - 1);
      words[i] = __ldg(p.qweight + (tile * p.col_tiles + column) * 32 + lane);
    }
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) {
      const int pair = i * kPrefillProducerThreads + thread, g = pair % 8;
      if (pair >= kPairs) break;
      const int64_t tile = min(row_block * kTiles + pair / (8 * kGroups), p.row_tiles - 1);
      const int group = min(col_tile * kStageCols / kGroup + pair / 8 % kGroups, p.groups - 1);
      const int64_t first = (tile * p.groups + group) * 16 + g;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        scales[i][h] = __ldg(p.scales + first + 8 * h);
        if (p.zeros) zeros[i][h] = __ldg(p.zeros + first + 8 * h);
      }
    }
  }

  template <int kTokenTiles>
  __device__ __forceinline__ void store(PrefillStage<kGroup, kRowTiles, kTokenTiles>& stage, bool has_zeros,
                                        int thread) {
    const int lane = thread % 32, warp = thread / 32;
#pragma unroll
    for (int i = 0; i < kOfWarp; ++i) {
      transpose_pairs(words[i].x, words[i].y, lane);
      transpose_pairs(words[i].z, words[i].w, lane);
      stage.weights[i * kPrefillProducerWarps + warp][lane] = words[i];
    }
    uint2* scale_pairs = &stage.scales[0][0][0];
    uint2* zero_pairs = &stage.zeros[0][0][0];
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) {
      const int pair = i * kPrefillProducerThreads + thread;
      if (pair >= kPairs) break;
      scale_pairs[pair] = make_uint2(__byte_perm(scales[i][0], 0, 0x1010), __byte_perm(scales[i][1], 0, 0x1010));
      if (has_zeros) zero_pairs[pair] = make_uint2(zero_pair<T>(zeros[i][0]), zero_pair<T>(zeros[i][1]));
    }
  }
};

// x of a stage without a map: rows that do not start at multiples of 16 bytes. The same bytes at the same places.
template <int kTokenTiles, typename T>
__device__ __forceinline__ void store_x(unsigned char (&x)[8 * kTokenTiles][128], const GemmParams<T>& p,
                                        int token_block, int first_col, int thread) {
  const int chunk = thread % 8, col = first_col + chunk * 8;
  for (int token = thread / 8; token < 8 * kTokenTiles; token += kPrefillProducerThreads / 8) {
    const int64_t row = token_block * 8 * kTokenTiles + token;
    uint4 values = make_uint4(0, 0, 0, 0);
    if (row < p.m && col < p.k) values = load_8x16bit<false>(p.x + row * p.x_row_stride + col);
    *reinterpret_cast<uint4*>(&x[token][(chunk ^ token % 8) * 16]) = values;
  }
  fence_proxy_async();
}

// kAhead: stages whose weights are under way in registers.
template <int kAhead, typename T, int kGroup, int kRowTiles, int kTokenTiles, int kStages>
__device__ __forceinline__ void produce(PrefillStage<kGroup, kRowTiles, kTokenTiles>* stages, uint64_t* full,
                                        uint64_t* empty, const PrefillParams<T>& params, int cta, int thread) {
  static_assert(kAhead % 2 == 0);  // the two stages of a unit are even and odd ones
  const GemmParams<T>& p = params.gemm;
  Cursor now(p.schedule, cta);
  Cursor ahead = now;
  Place place = p.schedule.place(now.tile), place_ahead = place;
  HeldWeights<T, kGroup, kRowTiles> held[kAhead];
  const auto load_ahead = [&](int i) {
    if (!ahead.left) return;
    held[i].load(p, place_ahead.row_block, ahead.unit * 2 + i % 2, thread);
    if (i % 2 && ahead.advance(p.schedule)) place_ahead = p.schedule.place(ahead.tile);
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) load_ahead(i);
  int stage = 0, phase = 0;
  while (now.left) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (!now.left) continue;
      const int col_tile = now.unit * 2 + i % 2;
      mbarrier_wait(empty + stage, phase ^ 1);
      if (!params.x_mapped) store_x<kTokenTiles>(stages[stage].x, p, place.token_block, col_tile * kStageCols, thread);
      if (thread == 0) {
        if (params.x_mapped) {
          mbarrier_arrive_expecting(full + stage, stages->kBytesOfX);
          tensor_load(stages[stage].x, params.x, place.token_block * 8 * kTokenTiles, col_tile * kStageCols,
                      full + stage);
        } else {
          mbarrier_arrive(full + stage);
        }
      }
      held[i].store(stages[stage], p.zeros != nullptr, thread);
      __syncwarp();
      if (thread % 32 == 0) mbarrier_arrive(full + stage);
      load_ahead(i);
      if (++stage == kStages) stage = 0, phase ^= 1;
      if (i % 2 && now.advance(p.schedule)) place = p.schedule.place(now.tile);
    }
  }
}

}  // namespace hf_fastpath
