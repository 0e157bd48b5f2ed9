// What the kernels of w4a16_gemm share: their parameters, and how a tile leaves the accumulators.
//
// A CTA's tile is kRows = 16 * kWarps * kRowTiles outputs by 8 * kTokenTiles rows of x ("tokens"). Warp w holds the row
// tiles w, w + kWarps, ...; of each, accumulators in the C fragments of mma.m16n8k16: with lane l = 4 * g + t, element
// i of token tile c is output g + 8 * (i / 2) and token 8 * c + 2 * t + i % 2.
#pragma once

#include "../common/dtype.cuh"
#include "../common/launch.cuh"
#include "../common/ptx.cuh"
#include "../kernels.h"
#include "schedule.cuh"

namespace hf_fastpath {

// What there is to choose from, by hf_fastpath/ops/w4a16_gemm.py's `variant`, which has the same table in words.
struct GemmVariant {
  int row_tiles, token_tiles;  // of a warp and of a CTA
  int stages;                  // of the ring in shared memory
  int ctas_per_sm;             // a split schedule has so many times the GPU's multiprocessors
  bool split;                  // which schedule
  bool exact_weights;          // a group's sum is multiplied by its scale, not each weight
  bool early_sum;              // the kernel that adds the parts is launched early; compute capability 9.0
  int steps;                   // w4a16_prefill_sm90.cu: runs of 16 columns in a group of wgmma
};
constexpr GemmVariant kGemmVariants[] = {
    {1, 4, 4, 2, true, true, false, 0},     // 0: mma.sync, 128 outputs x 32 tokens
    {2, 4, 4, 1, true, true, false, 0},     // 1: 256 x 32
    {1, 8, 3, 2, true, true, false, 0},     // 2: 128 x 64
    {2, 8, 4, 1, true, true, false, 0},     // 3: 256 x 64
    {2, 4, 6, 1, true, true, false, 0},     // 4: wgmma, 256 x 32
    {1, 8, 6, 1, true, true, false, 0},     // 5: 128 x 64
    {2, 8, 5, 1, true, true, false, 0},     // 6: 256 x 64
    {1, 8, 6, 1, true, true, true, 0},      // 7: 128 x 64, early sum
    {2, 8, 5, 1, true, true, true, 0},      // 8: 256 x 64, early sum
    {1, 32, 4, 1, false, false, false, 2},  // 9: prefill, 128 x 256, whole tiles
    {1, 32, 4, 1, false, false, false, 1},  // 10: 128 x 256, groups of 16 columns
    {1, 32, 4, 1, false, false, false, 4},  // 11: 128 x 256, groups of 64 columns
    {2, 16, 5, 1, false, false, false, 2},  // 12: 256 x 128, whole tiles
    {1, 16, 8, 1, false, false, false, 2},  // 13: 128 x 128, whole tiles
    {1, 32, 4, 1, true, false, true, 2},    // 14: 128 x 256, early sum
    {1, 16, 8, 1, true, false, true, 2},    // 15: 128 x 128, early sum
};

constexpr int kFirstSm90Variant = 4, kFirstPrefillVariant = 9;
static_assert(sizeof kGemmVariants / sizeof kGemmVariants[0] == kW4A16GemmVariants);

template <typename T>
struct GemmParams {
  const T* x;
  int64_t x_row_stride;
  const uint4* qweight;
  const uint16_t* scales;
  const uint8_t* zeros;
  const T* bias;
  T* y;
  float4* partial;  // [slot][row tile of a warp][token tile][thread]
  int m, n, k;
  int row_tiles, col_tiles, groups;
  bool x_aligned;  // every row of x starts at a multiple of 16 bytes
  Schedule schedule;
};

constexpr int kGemmWarps = 8;  // those that compute
constexpr int kGemmThreads = 32 * kGemmWarps;

// Whether this GPU's code of the kernel is the one with wgmma: compiled for sm_90a, not PTX of another architecture.
template <typename Kernel>
bool is_for_this_gpu(Kernel kernel) {
  int device = 0, major = 0, minor = 0;
  cudaFuncAttributes attributes = {};
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
                     cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess;
  if (!known) cudaGetLastError();
  return known && major == 9 && minor == 0 && attributes.ptxVersion == 90;
}

inline Schedule gemm_schedule(const GemmVariant& v, int m, int n, int k, int sm_count) {
  const int rows = 16 * kGemmWarps * v.row_tiles, tokens = 8 * v.token_tiles;
  const int row_blocks = (n + rows - 1) / rows, token_blocks = (m + tokens - 1) / tokens;
  const int units = (k + kUnitCols - 1) / kUnitCols, ctas = v.ctas_per_sm * sm_count;
  return (v.split ? split_schedule : whole_schedule)(row_blocks, token_blocks, units, ctas);
}

template <typename T>
GemmParams<T> gemm_params(const W4A16GemmArgs& a, int sm_count) {
  const bool aligned = reinterpret_cast<uintptr_t>(a.x) % 16 == 0 && (a.m == 1 || a.x_row_stride % 8 == 0);
  return {static_cast<const T*>(a.x),
          a.x_row_stride,
          static_cast<const uint4*>(a.qweight),
          static_cast<const uint16_t*>(a.scales),
          a.zeros,
          static_cast<const T*>(a.bias),
          static_cast<T*>(a.y),
          reinterpret_cast<float4*>(a.workspace),
          a.m,
          a.n,
          a.k,
          (a.n + 15) / 16,
          (a.k + 63) / 64,
          a.k / a.group_size,
          aligned,
          gemm_schedule(kGemmVariants[a.variant], a.m, a.n, a.k, sm_count)};
}

// A lane's 16 bytes of the row tiles `tile`, `tile` + kStep, ... Beyond the last row tile there are copies of it, which
// nobody stores; beyond the last column there is the last tile of columns, which meets zeros of x.
template <int kStep>
struct TileSource {
  const unsigned char* first;  // in the first column of tiles
  uint32_t step;               // bytes; ops.cpp takes K up to 2^24
  int last;

  template <typename T>
  __device__ __forceinline__ TileSource(const GemmParams<T>& p, int tile, int lane) {
    const int64_t row_tile = min(tile, p.row_tiles - 1);
    first = reinterpret_cast<const unsigned char*>(p.qweight + row_tile * p.col_tiles * 32 + lane);
    step = static_cast<uint32_t>(kStep) * p.col_tiles * 512;
    last = (p.row_tiles - 1 - static_cast<int>(row_tile)) / kStep;
  }
  // Of the i-th row tile; `column` is a pointer from column().
  __device__ __forceinline__ const void* at(const unsigned char* column, int i) const {
    return column + static_cast<uint64_t>(static_cast<uint32_t>(min(i, last))) * step;
  }
  template <typename T>
  __device__ __forceinline__ const unsigned char* column(const GemmParams<T>& p, int col_tile) const {
    return first + static_cast<uint64_t>(static_cast<uint32_t>(min(col_tile, p.col_tiles - 1))) * 512;
  }
};

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

// Adds the bias, rounds once and stores one 16 x 8 fragment. All lanes of the warp take part.
template <typename T>
__device__ __forceinline__ void store_fragment(const float (&acc)[4], const GemmParams<T>& p, int row_tile,
                                               int first_token, int lane) {
  const int g = lane / 4, t = lane % 4;
  // Transposed, a lane holds neighbouring outputs of one token instead of neighbouring tokens of one output.
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = row_tile * 16 + 8 * h + g;
    const float bias = p.bias && row < p.n ? to_float(p.bias[row]) : 0.0f;
    const uint32_t pair = transpose_8x8(pack_floats(acc[2 * h] + bias, acc[2 * h + 1] + bias, T()));
    const int token = first_token + g, column = row_tile * 16 + 8 * h + 2 * t;
    if (token < p.m && column < p.n) store_pair(p.y + static_cast<int64_t>(token) * p.n, column, p.n, pair);
  }
}

template <typename T, int kRowTiles, int kTokenTiles>
__device__ __forceinline__ void store_tile(const float (&acc)[kRowTiles][kTokenTiles][4], const GemmParams<T>& p,
                                           const Cursor& at, int cta, int thread) {
  const int warp = thread / 32, lane = thread % 32;
  const bool whole = at.did_all(p.schedule);
  const Place place = p.schedule.place(at.tile);
  const int64_t slot = p.schedule.slot(cta, at.tile);
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int c = 0; c < kTokenTiles; ++c) {
      const float (&part)[4] = acc[r][c];
      if (whole) {
        const int row_tile = (place.row_block * kRowTiles + r) * kGemmWarps + warp;
        store_fragment(part, p, row_tile, (place.token_block * kTokenTiles + c) * 8, lane);
      } else {
        p.partial[((slot * kRowTiles + r) * kTokenTiles + c) * kGemmThreads + thread] =
            make_float4(part[0], part[1], part[2], part[3]);
      }
    }
  }
}

// Adds the parts of the tiles that several CTAs computed, in the order of K. One CTA a tile, row tile and token tile.
template <typename T, int kRowTiles, int kTokenTiles>
__global__ void __launch_bounds__(kGemmThreads) w4a16_gemm_sum_kernel(const GemmParams<T> p) {
  wait_for_previous_kernel();  // even where there is nothing to add: the stream's next kernel waits for this one alone
  const Schedule& s = p.schedule;
  const int tile = blockIdx.x;
  const int64_t unit = static_cast<int64_t>(tile) * s.units;
  const int fragment = blockIdx.y, r = fragment / kTokenTiles, c = fragment % kTokenTiles;
  const int first = s.owner(unit), last = s.owner(unit + s.units - 1);
  if (first == last) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float sum[4] = {};
  for (int cta = first; cta <= last; ++cta) {
    const float4 part =
        p.partial[(s.slot(cta, tile) * kRowTiles * kTokenTiles + fragment) * kGemmThreads + threadIdx.x];
    sum[0] += part.x, sum[1] += part.y, sum[2] += part.z, sum[3] += part.w;
  }
  const Place place = s.place(tile);
  store_fragment(sum, p, (place.row_block * kRowTiles + r) * kGemmWarps + warp,
                 (place.token_block * kTokenTiles + c) * 8, lane);
}

template <typename T, int kRowTiles, int kTokenTiles>
cudaError_t launch_gemm_sum(const GemmParams<T>& p, bool early, cudaStream_t stream) {
  if (!p.schedule.has_partial_tiles()) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(p.schedule.tiles()), kRowTiles * kTokenTiles);
  const auto kernel = w4a16_gemm_sum_kernel<T, kRowTiles, kTokenTiles>;
  if (early) return launch_kernel_early(kernel, grid, kGemmThreads, stream, p);
  return launch_kernel(kernel, grid, kGemmThreads, stream, p);
}

// Floats of `partial` that a schedule needs.
inline int64_t partial_floats(const Schedule& s, int row_tiles_of_warp, int token_tiles) {
  return s.has_partial_tiles() ? int64_t{2} * s.ctas * row_tiles_of_warp * token_tiles * kGemmThreads * 4 : 0;
}

}  // namespace hf_fastpath
