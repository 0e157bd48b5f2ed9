// y = x @ W.T for 1..16 rows of x: what the kernels for packed weights share.
//
// The weights are the A operand of mma.m16n8k16, so a tile of 16 outputs meets 8 rows of x in one instruction and the
// tensor core is no slower for 8 rows than for 1. A CTA takes kRowTiles tiles of 16 outputs at a time; its warps split
// K in units of W::kUnitCols columns, unit u going to warp u % kWarps, and the partial sums are added in the order of
// the warps. Neither the split nor the order depends on the number of rows, so a row's bits do not either.
//
// A weight format W (int4_weights.cuh, w8a16_linear.cu) has: T, kUnitCols, kDepth (units in flight with one row tile),
// kRowScales (one scale an output, applied at the end), Unit<kRowTiles> (a lane's registers of one unit), load() and
// multiply().
#pragma once

#include <algorithm>

#include "../kernels.h"
#include "dequant.cuh"
#include "launch.cuh"
#include "memory.cuh"
#include "ptx.cuh"
#include "reduce.cuh"

namespace hf_fastpath::linear {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kCtasPerSm = 2;      // 128 registers a thread
constexpr int kPartialPitch = 20;  // floats from one row of x to the next in shared memory; 20 avoids bank conflicts

// What becomes of the sums of products. kSwiGlu: a CTA takes tile r of the weight's first half (gate) together with
// tile r of its second half (up).
enum class Epilogue { kBias, kResidual, kSwiGlu };

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
  const T* residual;     // (m, n), with Epilogue::kResidual; or nullptr
  const T* norm_weight;  // (k,), with kNorm
  float eps;
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

// Row tile r of a block. The last block may be one row tile short: it reads that tile twice and stores it once.
template <Epilogue kEpilogue, int kRowTiles, typename T>
__device__ __forceinline__ int row_tile_of(const Params<T>& p, int block, int r) {
  if constexpr (kEpilogue == Epilogue::kSwiGlu) return block + r * (p.row_tiles / 2);
  if constexpr (kRowTiles == 1) return block;
  return min(block * kRowTiles + r, p.row_tiles - 1);
}

// The B fragments of one unit: rows g (and g + 8) of x, 8 columns of each 32.
template <int kColTiles, int kUnitCols>
struct Activations {
  uint4 half_tile[kColTiles][kUnitCols / 32];
};

// Where this lane's part of each of its rows of x begins. Rows that are not there are the last one once more: what the
// tensor core makes of them is a column of its own, which nobody stores, and a clamped pointer costs less than a zero.
template <typename T, int kColTiles>
struct Rows {
  const T* begin[kColTiles];

  __device__ __forceinline__ Rows(const Params<T>& p, int lane) {
#pragma unroll
    for (int c = 0; c < kColTiles; ++c) {
      begin[c] = p.x + min(lane / 4 + 8 * c, p.m - 1) * p.x_row_stride + 8 * (lane % 4);
    }
  }
};

// kWhole (see launch()): unit < p.units, and rows are aligned to 16 bytes.
template <bool kWhole, typename T, int kColTiles, int kUnitCols>
__device__ __forceinline__ void load_activations(Activations<kColTiles, kUnitCols>& x, const Params<T>& p,
                                                 const Rows<T, kColTiles>& rows, int unit) {
#pragma unroll
  for (int c = 0; c < kColTiles; ++c) {
    const T* begin = rows.begin[c] + unit * kUnitCols;
#pragma unroll
    for (int h = 0; h < kUnitCols / 32; ++h) {
      if constexpr (kWhole) {
        x.half_tile[c][h] = load_early16(begin + 32 * h);
      } else {
        x.half_tile[c][h] = make_uint4(0, 0, 0, 0);
        if (unit * kUnitCols + 32 * h < p.k) x.half_tile[c][h] = load_8x16bit<false>(begin + 32 * h);
      }
    }
  }
}

// 1 / rms of rows g (and g + 8) of x; 0 for rows that are not there. Every CTA computes it for itself, every thread
// taking the same columns whatever the number of rows.
template <typename T, int kColTiles>
__device__ __forceinline__ void inverse_rms(float (&inverse)[kColTiles], const Params<T>& p) {
  __shared__ float squares[kMaxLinearRows][kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int row = 0; row < p.m; ++row) {
    float sum = 0.0f;
    for (int col = threadIdx.x * 8; col < p.k; col += kThreads * 8) {
      const uint4 v = load_8x16bit<true>(p.x + row * p.x_row_stride + col);
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float value = bits_to_float<T>(words[i / 2] >> (16 * (i % 2)));
        sum = fmaf(value, value, sum);
      }
    }
    sum = warp_sum(sum);
    if (lane == 0) squares[row][warp] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int c = 0; c < kColTiles; ++c) {
    const int row = lane / 4 + 8 * c;
    float sum = 0.0f;
    if (row < p.m) {
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += squares[row][w];
    }
    inverse[c] = row < p.m ? rsqrtf(sum / p.k + p.eps) : 0.0f;
  }
}

// RMSNorm with the roundings of transformers' LlamaRMSNorm: normalized in fp32, rounded, times the weight, rounded.
template <typename T, int kColTiles, int kUnitCols>
__device__ __forceinline__ void normalize(Activations<kColTiles, kUnitCols>& x, const Params<T>& p,
                                          const float (&inverse)[kColTiles], int unit, int lane) {
  using P = typename Pair<T>::type;
#pragma unroll
  for (int h = 0; h < kUnitCols / 32; ++h) {
    const int col = unit * kUnitCols + 32 * h;
    uint4 weight = make_uint4(0, 0, 0, 0);
    if (col < p.k) weight = load_8x16bit<true>(p.norm_weight + col + 8 * (lane % 4));
    const uint32_t weights[4] = {weight.x, weight.y, weight.z, weight.w};
#pragma unroll
    for (int c = 0; c < kColTiles; ++c) {
      uint4& v = x.half_tile[c][h];
      uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float lo = bits_to_float<T>(words[i]) * inverse[c], hi = bits_to_float<T>(words[i] >> 16) * inverse[c];
        words[i] = as_bits(__hmul2(as_pair<P>(pack_floats(lo, hi, T())), as_pair<P>(weights[i])));
      }
      v = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

// silu(gate) * up, each rounded to 16 bits where transformers' modules round.
template <typename T>
__device__ __forceinline__ T swiglu(float gate, float up) {
  const float g = to_float(from_float<T>(gate));
  const float activated = to_float(from_float<T>(g / (1.0f + expf(-g))));
  return from_float<T>(activated * to_float(from_float<T>(up)));
}

// Adds the warps' sums in their order, adds the bias and the residual, rounds once and stores the block's outputs.
// `partial` alternates between two buffers, so that one barrier a block is enough.
template <typename W, Epilogue kEpilogue, int kColTiles, int kRowTiles>
__device__ __forceinline__ void finish_block(const float (&acc)[kRowTiles][kColTiles][4], float* partial,
                                             const Params<typename W::T>& p, int block) {
  using T = typename W::T;
  constexpr int kRows = 8 * kColTiles, kTileFloats = kRows * kPartialPitch, kWarpFloats = kRowTiles * kTileFloats;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int c = 0; c < kColTiles; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 8 * c + 2 * t + i % 2, out = g + 8 * (i / 2);
        if (row >= p.m) continue;
        partial[warp * kWarpFloats + r * kTileFloats + row * kPartialPitch + out] = acc[r][c][i];
      }
    }
  }
  __syncthreads();
  const auto total = [&](int r, int row, int out, int column) {
    const float* source = partial + r * kTileFloats + row * kPartialPitch + out;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += source[w * kWarpFloats];
    const float bias = p.bias ? to_float(p.bias[column]) : 0.0f;
    // Written as one rounding: left to the compiler, the kernels for few and for many rows would not agree.
    if constexpr (W::kRowScales) return fmaf(sum, bits_to_float<T>(p.scales[column]), bias);
    return sum + bias;
  };
  if constexpr (kEpilogue == Epilogue::kSwiGlu) {
    const int half = p.n / 2;
#pragma unroll
    for (int first = 0; first < kRows * 16; first += kThreads) {
      const int i = first + threadIdx.x, out = i % 16, row = i / 16, column = block * 16 + out;
      if (row >= min(p.m, kRows)) continue;
      const T result = swiglu<T>(total(0, row, out, column), total(1, row, out, half + column));
      p.y[static_cast<int64_t>(row) * half + column] = result;
    }
  } else {
#pragma unroll
    for (int first = 0; first < kRowTiles * kRows * 16; first += kThreads) {
      const int i = first + threadIdx.x, out = i % 16, row = i / 16 % kRows, r = i / (16 * kRows);
      const int column = (block * kRowTiles + r) * 16 + out;
      if (r >= kRowTiles || row >= p.m || column >= p.n) continue;
      float sum = total(r, row, out, column);
      const int64_t index = static_cast<int64_t>(row) * p.n + column;
      if constexpr (kEpilogue == Epilogue::kResidual) {
        if (p.residual) sum += to_float(p.residual[index]);
      }
      p.y[index] = from_float<T>(sum);
    }
  }
}

template <int kRowTiles, int kColTiles>
__device__ __forceinline__ void clear(float (&acc)[kRowTiles][kColTiles][4]) {
#pragma unroll
  for (int i = 0; i < kRowTiles * kColTiles * 4; ++i) acc[i / (kColTiles * 4)][i / 4 % kColTiles][i % 4] = 0.0f;
}

// With more than 8 rows of x the activations are the larger traffic: two row tiles share them.
template <Epilogue kEpilogue, int kColTiles>
constexpr int kRowTilesOf = kEpilogue == Epilogue::kSwiGlu ? 2 : kColTiles;

template <typename W, int kColTiles, bool kWhole, Epilogue kEpilogue, bool kNorm>
__global__ void __launch_bounds__(kThreads, kCtasPerSm) linear_kernel(const Params<typename W::T> p) {
  using T = typename W::T;
  constexpr int kRowTiles = kRowTilesOf<kEpilogue, kColTiles>;
  constexpr int kDepth = W::kDepth / kRowTiles;    // units whose weights are in flight
  constexpr int kXDepth = kColTiles == 1 ? 2 : 1;  // and whose activations are: 16 registers a unit and 8 rows
  constexpr int kWarpFloats = kRowTiles * 8 * kColTiles * kPartialPitch;
  __shared__ float partial[2][kWarps * kWarpFloats];

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // A warp without a unit in the last round takes an empty one: all warps meet at every barrier from the same place.
  const int units = (p.units + kWarps - 1) / kWarps * kWarps;
  const int blocks = kEpilogue == Epilogue::kSwiGlu ? p.row_tiles / 2 : (p.row_tiles + kRowTiles - 1) / kRowTiles;
  Cursor now{static_cast<int>(blockIdx.x), warp};
  Cursor ahead = now;
  typename W::template Unit<kRowTiles> weights[kDepth];
#pragma unroll
  for (int d = 0; d < kDepth; ++d) {
    if (ahead.block < blocks) W::template load<kWhole, kEpilogue>(weights[d], p, ahead, lane);
    ahead.advance(units, warp);
  }
  const Rows<T, kColTiles> rows(p, lane);
  Activations<kColTiles, W::kUnitCols> x[kXDepth];
  const auto load_x = [&](int d, int unit) {
    load_activations<kWhole>(x[d % kXDepth], p, rows, kWhole ? min(unit, p.units - 1) : unit);
  };
  if constexpr (kXDepth == 2) load_x(0, now.unit);
  [[maybe_unused]] float inverse[kColTiles];
  if constexpr (kNorm) inverse_rms(inverse, p);
  float acc[kRowTiles][kColTiles][4] = {};
  int buffer = 0;
  while (now.block < blocks) {
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      if (now.block >= blocks) continue;  // not `break`: a loop with a second exit is not unrolled around a barrier
      Cursor next = now;
      next.advance(units, warp);
      if constexpr (kXDepth == 1) load_x(0, now.unit);
      if constexpr (kXDepth == 2) load_x(d + 1, next.unit);
      if constexpr (kNorm) normalize(x[d % kXDepth], p, inverse, now.unit, lane);
      // An empty unit was loaded with scales of 0, or what has none as the last unit once more: that is not counted.
      if (!kWhole || !W::kRowScales || now.unit < p.units) {
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) W::multiply(acc[r], weights[d], r, x[d % kXDepth], lane);
      }
      if (ahead.block < blocks) W::template load<kWhole, kEpilogue>(weights[d], p, ahead, lane);
      ahead.advance(units, warp);
      if (now.last_of_block(units)) {
        finish_block<W, kEpilogue>(acc, partial[buffer], p, now.block);
        buffer ^= 1;
        clear(acc);
      }
      now = next;
    }
  }
}

// kWhole: rows of x start at multiples of 16 bytes, and units are whole, so that nothing has to be checked for each
// load.
template <typename W, int kColTiles, bool kWhole, Epilogue kEpilogue, bool kNorm>
cudaError_t launch(const Params<typename W::T>& p, int sm_count, cudaStream_t stream) {
  constexpr int kRowTiles = kRowTilesOf<kEpilogue, kColTiles>;
  const int blocks = kEpilogue == Epilogue::kSwiGlu ? p.row_tiles / 2 : (p.row_tiles + kRowTiles - 1) / kRowTiles;
  const int grid = std::min(blocks, kCtasPerSm * sm_count);
  return launch_kernel(linear_kernel<W, kColTiles, kWhole, kEpilogue, kNorm>, grid, kThreads, stream, p);
}

template <typename T>
bool aligned_rows(const Params<T>& p) {
  return aligned_to(p.x, 16) && (p.m == 1 || p.x_row_stride % 8 == 0);
}

template <typename W, Epilogue kEpilogue, bool kNorm>
cudaError_t launch_for_size(const Params<typename W::T>& p, int sm_count, cudaStream_t stream) {
  const bool whole = aligned_rows(p) && p.k % W::kUnitCols == 0;
  if (p.m <= 8) {
    return whole ? launch<W, 1, true, kEpilogue, kNorm>(p, sm_count, stream)
                 : launch<W, 1, false, kEpilogue, kNorm>(p, sm_count, stream);
  }
  return whole ? launch<W, 2, true, kEpilogue, kNorm>(p, sm_count, stream)
               : launch<W, 2, false, kEpilogue, kNorm>(p, sm_count, stream);
}

// The plain product, of x as it is.
template <typename W>
cudaError_t launch_plain(const Params<typename W::T>& p, int sm_count, cudaStream_t stream) {
  return launch_for_size<W, Epilogue::kBias, false>(p, sm_count, stream);
}

// A fused product: of x's RMSNorm where there is a norm_weight.
template <typename W, Epilogue kEpilogue>
cudaError_t launch_fused(const Params<typename W::T>& p, int sm_count, cudaStream_t stream) {
  if (!aligned_rows(p) || (p.norm_weight && !aligned_to(p.norm_weight, 16))) return cudaErrorMisalignedAddress;
  return p.norm_weight ? launch_for_size<W, kEpilogue, true>(p, sm_count, stream)
                       : launch_for_size<W, kEpilogue, false>(p, sm_count, stream);
}

}  // namespace hf_fastpath::linear
