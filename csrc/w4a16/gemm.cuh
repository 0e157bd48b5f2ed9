// What the kernels of w4a16_gemm share: their parameters, and how a tile leaves the accumulators.
//
// A CTA's tile is 128 outputs, one row tile of 16 for each of its warps, by 8 * kTokenTiles rows of x
// ("tokens"). Accumulators are the C fragments of mma.m16n8k16: with lane l = 4 * g + t, element i of token tile c is
// output g + 8 * (i / 2) of the warp's row tile and token 8 * c + 2 * t + i % 2.
#pragma once

#include "../common/dtype.cuh"
#include "../common/ptx.cuh"
#include "../kernels.h"
#include "schedule.cuh"

namespace hf_fastpath {

// What there is to choose from, by hf_fastpath/ops/w4a16_gemm.py's `variant`, which has the same table in words.
struct GemmVariant {
  int token_tiles;
  int stages;       // of the ring in shared memory
  int ctas_per_sm;  // that fit at the same time
  int splits;       // w4a16_gemm_sm90.cu: CTAs of a cluster, which divide K; 0 for "stream-K"
};
constexpr GemmVariant kGemmVariants[] = {
    {4, 4, 2, 0},   // 0: mma.sync, 128 outputs x 32 tokens
    {8, 3, 2, 0},   // 1: 128 x 64
    {4, 6, 2, 1},   // 2: wgmma, 128 x 32
    {4, 6, 2, 2},   // 3
    {4, 6, 2, 4},   // 4
    {4, 6, 2, 6},   // 5
    {4, 6, 2, 7},   // 6
    {8, 4, 2, 1},   // 7: 128 x 64
    {8, 4, 2, 2},   // 8
    {8, 4, 2, 4},   // 9
    {8, 4, 2, 6},   // 10
    {8, 4, 2, 7},   // 11
    {16, 8, 1, 1},  // 12: 128 x 128
    {16, 8, 1, 2},  // 13
    {16, 8, 1, 4},  // 14
    {32, 4, 1, 1},  // 15: 128 x 256
    {32, 4, 1, 2},  // 16
    {32, 4, 1, 4},  // 17
};

constexpr int kFirstSm90Variant = 2;
static_assert(sizeof kGemmVariants / sizeof kGemmVariants[0] == kW4A16GemmVariants);

template <typename T>
struct GemmParams {
  const T* x;
  int64_t x_row_stride;
  const uint4* qweight;
  const uint16_t* scales;
  const uint8_t* zeros;
  const T* bias;
  const T* residual;  // as y
  T* y;
  int m, n, k;
  int row_tiles, col_tiles, groups;
  bool x_aligned;  // every row of x starts at a multiple of 16 bytes
};

template <typename T>
GemmParams<T> gemm_params(const W4A16GemmArgs& a) {
  const bool aligned = reinterpret_cast<uintptr_t>(a.x) % 16 == 0 && (a.m == 1 || a.x_row_stride % 8 == 0);
  return {static_cast<const T*>(a.x),
          a.x_row_stride,
          static_cast<const uint4*>(a.qweight),
          static_cast<const uint16_t*>(a.scales),
          a.zeros,
          static_cast<const T*>(a.bias),
          static_cast<const T*>(a.residual),
          static_cast<T*>(a.y),
          a.m,
          a.n,
          a.k,
          (a.n + 15) / 16,
          (a.k + 63) / 64,
          a.k / a.group_size,
          aligned};
}

constexpr int kGemmWarps = 8;  // those that compute: a row tile of 16 outputs each
constexpr int kGemmThreads = 32 * kGemmWarps;

inline Tiles gemm_tiles(const GemmVariant& v, int m, int n, int k) {
  const int tokens = 8 * v.token_tiles, outputs = 16 * kGemmWarps;
  return {(n + outputs - 1) / outputs, (m + tokens - 1) / tokens, (k + kUnitCols - 1) / kUnitCols};
}

// Stores columns `column` (even) and `column` + 1 of a row of n, as far as they are there.
template <typename T>
__device__ __forceinline__ void store_pair(T* row, int column, int n, uint32_t pair) {
  if (n % 2 == 0) {  // else only every other row is aligned to four bytes
    *reinterpret_cast<uint32_t*>(row + column) = pair;
    return;
  }
  uint16_t* target = reinterpret_cast<uint16_t*>(row + column);
  target[0] = static_cast<uint16_t>(pair);
  if (column + 1 < n) target[1] = static_cast<uint16_t>(pair >> 16);
}

// How a warp stores the fragments of one row tile: what they have in common is loaded once.
template <typename T>
class FragmentStore {
 public:
  __device__ __forceinline__ FragmentStore(const GemmParams<T>& p, int row_tile, int lane)
      : y_(p.y), residual_(p.residual), m_(p.m), n_(p.n), lane_(lane), first_(row_tile * 16) {
    const int row = first_ + lane / 4;
    bias_[0] = p.bias && row < p.n ? to_float(p.bias[row]) : 0.0f;
    bias_[1] = p.bias && row + 8 < p.n ? to_float(p.bias[row + 8]) : 0.0f;
  }
  // Adds the bias and the residual, rounds once and stores one 16 x 8 fragment. All lanes of the warp take part.
  __device__ __forceinline__ void store(const float (&acc)[4], int first_token) const {
    float sum[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = acc[i] + bias_[i / 2];
    if (residual_) add_residual(sum, first_token);
    store_pairs({pack_floats(sum[0], sum[1], T()), pack_floats(sum[2], sum[3], T())}, first_token);
  }
  // Stores a fragment that is rounded already: of each output its two tokens.
  __device__ __forceinline__ void store_pairs(const uint2& pairs, int first_token) const {
    const int token = first_token + lane_ / 4, column = first_ + lane_ % 4 * 2;
    T* const row = y_ + static_cast<int64_t>(token) * n_;
    // Transposed, a lane holds neighbouring outputs of one token instead of neighbouring tokens of one output.
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t pair = transpose_8x8(h ? pairs.y : pairs.x);
      if (token < m_ && column + 8 * h < n_) store_pair(row, column + 8 * h, n_, pair);
    }
  }

 private:
  __device__ __forceinline__ void add_residual(float (&sum)[4], int first_token) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = first_token + lane_ % 4 * 2 + i % 2, row = first_ + lane_ / 4 + i / 2 * 8;
      if (token < m_ && row < n_) sum[i] += to_float(residual_[static_cast<int64_t>(token) * n_ + row]);
    }
  }

  T* y_;
  const T* residual_;
  int m_, n_, lane_, first_;
  float bias_[2];
};

template <typename T>
__device__ __forceinline__ void store_fragment(const float (&acc)[4], const GemmParams<T>& p, int row_tile,
                                               int first_token, int lane) {
  FragmentStore<T>(p, row_tile, lane).store(acc, first_token);
}

}  // namespace hf_fastpath
