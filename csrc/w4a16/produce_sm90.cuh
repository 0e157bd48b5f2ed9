// The producers of w4a16_gemm_sm90.cu: what a stage holds, and how it gets there.
#pragma once

#include "../common/memory.cuh"
#include "../common/ptx_sm90.cuh"
#include "gemm.cuh"

namespace hf_fastpath {

constexpr int kProducerThreads = 128;
// Arrivals that fill a stage: of each thread's weights, of each warp's x.
constexpr int kFillArrivals = kProducerThreads + kProducerThreads / 32;

template <int kGroup, int kRowTiles, int kTokenTiles>
struct __align__(1024) Sm90Stage {
  static constexpr int kGroups = kUnitCols / kGroup;
  // Two runs of 64 columns, each the B operand of wgmma_descriptor(): rows of 128 bytes, swizzled.
  unsigned char x[2][8 * kTokenTiles][128];
  uint4 weights[kRowTiles * kGemmWarps][2][32];
  uint16_t scales[kRowTiles * kGemmWarps][kGroups][16];
  uint8_t zeros[kRowTiles * kGemmWarps][kGroups][16];
};

// What a thread copies of the weights, scales and zeros of each unit of one tile of outputs.
template <int kGroup, int kRowTiles>
struct WeightShare {
  static constexpr int kTiles = kRowTiles * kGemmWarps, kGroups = kUnitCols / kGroup;
  static_assert(kProducerThreads == 128 && kTiles * kGroups * 2 <= kProducerThreads);
  TileSource<2> tiles;  // of warps 0 and 1 the even row tiles, of 2 and 3 the odd ones; of 0 and 2 the left column
  int64_t first_group;  // of the row tile whose scales the thread copies

  template <typename T>
  __device__ __forceinline__ WeightShare(const GemmParams<T>& p, int row_block, int thread)
      : tiles(p, row_block * kTiles + thread / 64, thread % 32),
        first_group(int64_t{min(row_block * kTiles + thread / (2 * kGroups), p.row_tiles - 1)} * p.groups) {}

  template <typename T, int kTokenTiles>
  __device__ __forceinline__ void copy(Sm90Stage<kGroup, kRowTiles, kTokenTiles>& stage, const GemmParams<T>& p,
                                       int unit, int thread, uint64_t policy) const {
    const int left_or_right = thread / 32 % 2;
    const unsigned char* column = tiles.column(p, unit * 2 + left_or_right);
#pragma unroll
    for (int j = 0; j < kTiles / 2; ++j) {
      cp_async16_once(&stage.weights[2 * j + thread / 64][left_or_right][thread % 32], tiles.at(column, j), policy);
    }
    if (thread < kTiles * kGroups * 2) {
      const int tile = thread / (2 * kGroups), i = thread / 2 % kGroups, first = thread % 2 * 8;
      const int64_t group = first_group + min(unit * kGroups + i, p.groups - 1);
      cp_async16(&stage.scales[tile][i][first], p.scales + group * 16 + first);
      if (p.zeros && first == 0) cp_async16(&stage.zeros[tile][i][0], p.zeros + group * 16);
    }
  }
};

// A thread's share of 64 columns of x: 8 columns of every 16th token.
template <int kTokenTiles>
struct XShare {
  static constexpr int kChunks = kTokenTiles / 2;
  uint4 chunk[kChunks];

  template <bool kAligned, typename T>
  __device__ __forceinline__ void load_rows(const T* source, int64_t row_stride, int rows) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      chunk[i] = make_uint4(0, 0, 0, 0);
      if (16 * i < rows) chunk[i] = load_8x16bit<kAligned>(source + 16 * i * row_stride);
    }
  }

  template <typename T>
  __device__ __forceinline__ void load(const GemmParams<T>& p, int token_block, int first_col, int thread) {
    const int col = first_col + thread % 8 * 8, row = token_block * 8 * kTokenTiles + thread / 8;
    const int rows = col < p.k ? p.m - row : 0;
    const T* source = p.x + (rows > 0 ? row * p.x_row_stride + col : 0);
    if (p.x_aligned) {
      load_rows<true>(source, p.x_row_stride, rows);
    } else {
      load_rows<false>(source, p.x_row_stride, rows);
    }
  }

  // Pair u of chunk t of 32 columns is pair t of chunk u in a fragment's order. The 8 chunks of a token and the 4
  // tokens of a warp meet all banks once: the swizzle tells tokens apart, 4 * (chunk / 4) the two runs of 32 columns.
  __device__ __forceinline__ void store(unsigned char (&x)[8 * kTokenTiles][128], int thread) const {
    const int token = thread / 8, run = thread % 8 / 4, t = thread % 4;
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const int offset = ((4 * run + u) ^ (token % 8)) * 16 + 4 * t;
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        const uint32_t pair = u == 0 ? chunk[i].x : u == 1 ? chunk[i].y : u == 2 ? chunk[i].z : chunk[i].w;
        *reinterpret_cast<uint32_t*>(&x[token + 16 * i][offset]) = pair;
      }
    }
  }
};

// kXRegisters: of each thread, for x that is under way.
template <int kXRegisters, typename T, int kGroup, int kRowTiles, int kTokenTiles, int kStages>
__device__ __forceinline__ void produce(Sm90Stage<kGroup, kRowTiles, kTokenTiles>* stages, uint64_t* full,
                                        uint64_t* empty, const GemmParams<T>& p, int cta, int thread) {
  constexpr int kAhead = kXRegisters / (4 * XShare<kTokenTiles>::kChunks);  // runs of 64 columns
  static_assert(kAhead == 1 || kAhead % 2 == 0);
  constexpr int kUnroll = kAhead == 1 ? 2 : kAhead;  // two runs are a unit
  const int lane = thread % 32;
  const uint64_t policy = evict_first_policy();
  Cursor now(p.schedule, cta);
  Cursor ahead = now;
  const Place place = p.schedule.place(now.tile);
  int token_block = place.token_block;  // of `ahead`
  WeightShare<kGroup, kRowTiles> weights(p, place.row_block, thread);
  XShare<kTokenTiles> share[kAhead];
  const auto load_ahead = [&](int run) {
    if (!ahead.left) return;
    share[run % kAhead].load(p, token_block, ahead.unit * kUnitCols + run % 2 * 64, thread);
    if (run % 2 && ahead.advance(p.schedule)) token_block = p.schedule.place(ahead.tile).token_block;
  };
#pragma unroll
  for (int run = 0; run < kAhead; ++run) load_ahead(run);
  int stage = 0, phase = 0;
  while (now.left) {
#pragma unroll
    for (int run = 0; run < kUnroll; ++run) {
      if (!now.left) continue;
      if (run % 2 == 0) {
        mbarrier_wait(empty + stage, phase ^ 1);
        weights.copy(stages[stage], p, now.unit, thread, policy);
        mbarrier_arrive_after_copies(full + stage);
      }
      share[run % kAhead].store(stages[stage].x[run % 2], thread);
      if (run % 2) {
        fence_proxy_async();
        __syncwarp();
        if (lane == 0) mbarrier_arrive(full + stage);
        if (now.advance(p.schedule)) {
          weights = WeightShare<kGroup, kRowTiles>(p, p.schedule.place(now.tile).row_block, thread);
        }
        if (++stage == kStages) stage = 0, phase ^= 1;
      }
      load_ahead(run + kAhead);  // after the fence, which may wait for loads
    }
  }
}

}  // namespace hf_fastpath
