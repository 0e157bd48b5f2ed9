// y = x @ W.T + bias for 1..16 rows of x and W packed int4 (hf_fastpath/packing.py).
//
// The weights are the A operand of mma.m16n8k16, so a tile of 16 outputs meets 8 rows of x in one instruction and the
// tensor core is no slower for 8 rows than for 1. A CTA takes kRowTiles tiles of 16 outputs at a time; its warps split
// K in units of 128 columns, unit u going to warp u % kWarps, and the partial sums are added in the order of the warps.
// Neither the split nor the order depends on the number of rows, so a row's bits do not either.
//
// q - zero is exact in 16 bits, products and sums of a group are fp32, and the group's sum is multiplied by its scale
// in fp32: the scaled weight is never rounded to 16 bits, unlike in w4a16_dequantize.
#include <algorithm>

#include "common/dequant.cuh"
#include "common/launch.cuh"
#include "common/memory.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "kernels.h"

namespace hf_fastpath {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kUnitCols = 128;     // one group of the largest size: two tiles
constexpr int kCtasPerSm = 2;      // 128 registers a thread
constexpr int kPartialPitch = 20;  // floats from one row of x to the next in shared memory; 20 avoids bank conflicts

template <typename T>
struct Params {
  const T* x;
  int64_t x_row_stride;
  const uint4* qweight;
  const uint16_t* scales;
  const uint8_t* zeros;
  const T* bias;
  T* y;
  int m, n, k;
  int row_tiles, col_tiles, units;
};

// The weights of one unit and kRowTiles row tiles. The 16 to 64 scales (and zeros) of a row tile are spread over the
// warp in storage order, one load a lane; group_value() hands them out by shuffles.
template <int kGroup, int kRowTiles>
struct Weights {
  uint4 tile[kRowTiles][2];
  uint32_t scales[kRowTiles], zeros[kRowTiles];
};

// Where a warp is in its sequence of units: all units of one row block, then those of the CTA's next row block.
struct Cursor {
  int block, unit;

  __device__ __forceinline__ bool last_of_block(int units) const { return unit + kWarps >= units; }
  __device__ __forceinline__ void advance(int units, int first_unit) {
    unit += kWarps;
    if (unit < units) return;
    unit = first_unit;
    block += gridDim.x;
  }
};

// A lane's share of kCount consecutive per-group values from index `first`, of which `valid` exist: two neighbours when
// there are 64, else one.
template <int kCount, typename V>
__device__ __forceinline__ uint32_t load_group_values(const V* values, int64_t first, int valid, int lane) {
  if constexpr (kCount == 64) {
    if (2 * lane >= valid) return 0;
    const V* p = values + first + 2 * lane;
    if constexpr (sizeof(V) == 2) return __ldg(reinterpret_cast<const uint32_t*>(p));
    const uint32_t both = __ldg(reinterpret_cast<const uint16_t*>(p));
    return (both & 0xff) | ((both & 0xff00) << 8);
  } else {
    const int index = lane % kCount;
    return index < valid ? __ldg(values + first + index) : 0;
  }
}

// The value of index `index` out of a share loaded by load_group_values.
template <int kCount>
__device__ __forceinline__ uint32_t group_value(uint32_t share, int index) {
  if constexpr (kCount == 64) {
    const uint32_t both = __shfl_sync(kFullWarp, share, index / 2);
    return index % 2 ? both >> 16 : both & 0xffff;
  } else {
    return __shfl_sync(kFullWarp, share, index);
  }
}

template <typename T, int kGroup, bool kZeros, int kRowTiles>
__device__ __forceinline__ void load_weights(Weights<kGroup, kRowTiles>& w, const Params<T>& p, Cursor at, int lane) {
  constexpr int kGroups = kUnitCols / kGroup;
  const int groups = p.k / kGroup;
  const int first_group = at.unit * kGroups;
  const int valid = min(kGroups, groups - first_group) * 16;  // <= 0 for an empty unit
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    // The last block may be one row tile short: it reads that tile twice and stores it once.
    const int64_t row_tile = min(at.block * kRowTiles + r, p.row_tiles - 1);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int col_tile = at.unit * 2 + c;
      w.tile[r][c] = make_uint4(0, 0, 0, 0);
      if (col_tile < p.col_tiles) {
        w.tile[r][c] = load_once16(p.qweight + (row_tile * p.col_tiles + col_tile) * 32 + lane);
      }
    }
    const int64_t first = (row_tile * groups + first_group) * 16;
    w.scales[r] = load_group_values<16 * kGroups>(p.scales, first, valid, lane);
    if constexpr (kZeros) w.zeros[r] = load_group_values<16 * kGroups>(p.zeros, first, valid, lane);
  }
}

// The B fragments of one unit: rows g (and g + 8) of x, 8 columns of each 32.
template <int kColTiles>
struct Activations {
  uint4 half_tile[kColTiles][4];
};

template <typename T, bool kAligned, int kColTiles>
__device__ __forceinline__ void load_activations(Activations<kColTiles>& x, const Params<T>& p, int unit, int lane) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int c = 0; c < kColTiles; ++c) {
    const int row = g + 8 * c;
#pragma unroll
    for (int h = 0; h < 4; ++h) {
      const int col = unit * kUnitCols + 32 * h;
      x.half_tile[c][h] = make_uint4(0, 0, 0, 0);
      if (row < p.m && col < p.k) {
        x.half_tile[c][h] = load_8x16bit<kAligned>(p.x + row * p.x_row_stride + col + 8 * t);
      }
    }
  }
}

// acc += scale * (the unit's products), for one row tile.
template <typename T, int kGroup, bool kZeros, int kColTiles>
__device__ __forceinline__ void multiply_unit(float (&acc)[kColTiles][4], const uint4 (&tile)[2], uint32_t scales,
                                              uint32_t zeros, const Activations<kColTiles>& x, int lane) {
  constexpr int kGroups = kUnitCols / kGroup, kWords = 8 / kGroups;
  const int g = lane / 4;
  const uint32_t words[8] = {tile[0].x, tile[0].y, tile[0].z, tile[0].w, tile[1].x, tile[1].y, tile[1].z, tile[1].w};
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    uint32_t zero_lo = zero_pair<T>(8), zero_hi = zero_lo;
    if constexpr (kZeros) {
      zero_lo = zero_pair<T>(group_value<16 * kGroups>(zeros, group * 16 + g));
      zero_hi = zero_pair<T>(group_value<16 * kGroups>(zeros, group * 16 + g + 8));
    }
    float sum[kColTiles][4] = {};
#pragma unroll
    for (int i = group * kWords; i < (group + 1) * kWords; ++i) {
      uint32_t a[4];
      int4_fragment<T>(words[i], zero_lo, zero_hi, a);
#pragma unroll
      for (int c = 0; c < kColTiles; ++c) {
        const uint4& b = x.half_tile[c][i / 2];
        mma_m16n8k16<T>(sum[c], a, i % 2 ? b.z : b.x, i % 2 ? b.w : b.y);
      }
    }
    const float scale_lo = bits_to_float<T>(group_value<16 * kGroups>(scales, group * 16 + g));
    const float scale_hi = bits_to_float<T>(group_value<16 * kGroups>(scales, group * 16 + g + 8));
#pragma unroll
    for (int c = 0; c < kColTiles; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[c][i] = fmaf(sum[c][i], i < 2 ? scale_lo : scale_hi, acc[c][i]);
    }
  }
}

// Adds the warps' sums in their order, adds the bias, rounds once and stores the block's outputs. `partial` alternates
// between two buffers, so that one barrier a block is enough.
template <typename T, int kColTiles, int kRowTiles>
__device__ __forceinline__ void finish_block(const float (&acc)[kRowTiles][kColTiles][4], float* partial,
                                             const Params<T>& p, int block) {
  constexpr int kRows = 8 * kColTiles, kTileFloats = kRows * kPartialPitch, kWarpFloats = kRowTiles * kTileFloats;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int c = 0; c < kColTiles; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 8 * c + 2 * t + i % 2, out = g + 8 * (i / 2);
        partial[warp * kWarpFloats + r * kTileFloats + row * kPartialPitch + out] = acc[r][c][i];
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kRowTiles * kRows * 16; i += kThreads) {
    const int out = i % 16, row = i / 16 % kRows, r = i / (16 * kRows);
    const int column = (block * kRowTiles + r) * 16 + out;
    if (row >= p.m || column >= p.n) continue;
    const float* source = partial + r * kTileFloats + row * kPartialPitch + out;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += source[w * kWarpFloats];
    if (p.bias) sum += to_float(p.bias[column]);
    p.y[static_cast<int64_t>(row) * p.n + column] = from_float<T>(sum);
  }
}

template <int kRowTiles, int kColTiles>
__device__ __forceinline__ void clear(float (&acc)[kRowTiles][kColTiles][4]) {
#pragma unroll
  for (int i = 0; i < kRowTiles * kColTiles * 4; ++i) acc[i / (kColTiles * 4)][i / 4 % kColTiles][i % 4] = 0.0f;
}

template <typename T, int kGroup, bool kZeros, int kColTiles, bool kAligned>
__global__ void __launch_bounds__(kThreads, kCtasPerSm) w4a16_linear_kernel(const Params<T> p) {
  // With more than 8 rows of x the activations are the larger traffic: two row tiles share them.
  constexpr int kRowTiles = kColTiles;
  constexpr int kDepth = kColTiles == 1 ? 4 : 2;   // units whose weights are in flight
  constexpr int kXDepth = kColTiles == 1 ? 2 : 1;  // and whose activations are: 16 registers a unit and 8 rows
  constexpr int kWarpFloats = kRowTiles * 8 * kColTiles * kPartialPitch;
  __shared__ float partial[2][kWarps * kWarpFloats];

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // A warp without a unit in the last round takes an empty one: all warps meet at every barrier from the same place.
  const int units = (p.units + kWarps - 1) / kWarps * kWarps;
  const int blocks = (p.row_tiles + kRowTiles - 1) / kRowTiles;
  Cursor now{static_cast<int>(blockIdx.x), warp};
  Cursor ahead = now;
  Weights<kGroup, kRowTiles> weights[kDepth];
#pragma unroll
  for (int d = 0; d < kDepth; ++d) {
    if (ahead.block < blocks) load_weights<T, kGroup, kZeros>(weights[d], p, ahead, lane);
    ahead.advance(units, warp);
  }
  Activations<kColTiles> x[kXDepth];
  if constexpr (kXDepth == 2) load_activations<T, kAligned>(x[0], p, now.unit, lane);
  float acc[kRowTiles][kColTiles][4] = {};
  int buffer = 0;
  while (now.block < blocks) {
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      if (now.block >= blocks) continue;  // not `break`: a loop with a second exit is not unrolled around a barrier
      Cursor next = now;
      next.advance(units, warp);
      if constexpr (kXDepth == 1) load_activations<T, kAligned>(x[0], p, now.unit, lane);
      if constexpr (kXDepth == 2) load_activations<T, kAligned>(x[(d + 1) % 2], p, next.unit, lane);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        multiply_unit<T, kGroup, kZeros>(acc[r], weights[d].tile[r], weights[d].scales[r], weights[d].zeros[r],
                                         x[d % kXDepth], lane);
      }
      if (ahead.block < blocks) load_weights<T, kGroup, kZeros>(weights[d], p, ahead, lane);
      ahead.advance(units, warp);
      if (now.last_of_block(units)) {
        finish_block<T>(acc, partial[buffer], p, now.block);
        buffer ^= 1;
        clear(acc);
      }
      now = next;
    }
  }
}

template <typename T, int kGroup, bool kZeros, int kColTiles, bool kAligned>
cudaError_t launch(const Params<T>& p, int sm_count, cudaStream_t stream) {
  const int blocks = (p.row_tiles + kColTiles - 1) / kColTiles;
  const int grid = std::min(blocks, kCtasPerSm * sm_count);
  return launch_kernel(w4a16_linear_kernel<T, kGroup, kZeros, kColTiles, kAligned>, grid, kThreads, stream, p);
}

template <typename T, int kGroup, bool kZeros, int kColTiles>
cudaError_t launch_for_alignment(const Params<T>& p, int sm_count, cudaStream_t stream) {
  const bool aligned = aligned_to(p.x, 16) && (p.m == 1 || p.x_row_stride % 8 == 0);
  if (aligned) return launch<T, kGroup, kZeros, kColTiles, true>(p, sm_count, stream);
  return launch<T, kGroup, kZeros, kColTiles, false>(p, sm_count, stream);
}

template <typename T, int kGroup>
cudaError_t launch_for_rows(const Params<T>& p, int sm_count, cudaStream_t stream) {
  if (p.m <= 8) {
    if (p.zeros) return launch_for_alignment<T, kGroup, true, 1>(p, sm_count, stream);
    return launch_for_alignment<T, kGroup, false, 1>(p, sm_count, stream);
  }
  if (p.zeros) return launch_for_alignment<T, kGroup, true, 2>(p, sm_count, stream);
  return launch_for_alignment<T, kGroup, false, 2>(p, sm_count, stream);
}

template <typename T>
cudaError_t launch_for_group(const W4A16LinearArgs& a, int sm_count, cudaStream_t stream) {
  const Params<T> p{static_cast<const T*>(a.x),
                    a.x_row_stride,
                    static_cast<const uint4*>(a.qweight),
                    static_cast<const uint16_t*>(a.scales),
                    a.zeros,
                    static_cast<const T*>(a.bias),
                    static_cast<T*>(a.y),
                    a.m,
                    a.n,
                    a.k,
                    (a.n + 15) / 16,
                    (a.k + 63) / 64,
                    (a.k + kUnitCols - 1) / kUnitCols};
  if (a.group_size == 32) return launch_for_rows<T, 32>(p, sm_count, stream);
  if (a.group_size == 64) return launch_for_rows<T, 64>(p, sm_count, stream);
  return launch_for_rows<T, 128>(p, sm_count, stream);
}

}  // namespace

cudaError_t launch_w4a16_linear(const W4A16LinearArgs& args, Dtype dtype, int sm_count, cudaStream_t stream) {
  if (dtype == Dtype::kFloat16) return launch_for_group<__half>(args, sm_count, stream);
  return launch_for_group<__nv_bfloat16>(args, sm_count, stream);
}

}  // namespace hf_fastpath
