// What the products of decode_linear.cuh do with a block's sums.
#pragma once

#include "decode_short_conv.cuh"
#include "decode_types.cuh"

namespace hf_fastpath::linear {

// silu(gate) * up, each rounded to 16 bits where transformers' modules round.
template <typename T>
__device__ __forceinline__ T swiglu(float gate, float up) {
  const float g = to_float(from_float<T>(gate));
  const float activated = to_float(from_float<T>(g / (1.0f + expf(-g))));
  return from_float<T>(activated * to_float(from_float<T>(up)));
}

// Adds the chains' sums in their order, adds the bias and the residual, rounds once and stores the block's outputs. A
// warp has the chains warp, warp + kWarps, ...
template <typename W, Epilogue kEpilogue, int kWarps, int kOwnChains, int kRowTiles, int kColTiles>
__device__ __forceinline__ void finish_block(const float (&acc)[kOwnChains][kRowTiles][kColTiles][4], float* partial,
                                             const Params<typename W::T>& p, int row_tile, int rows_left) {
  using T = typename W::T;
  constexpr int kThreads = 32 * kWarps, kRows = 8 * kColTiles, kTileFloats = kRows * kPartialPitch,
                kChainFloats = kRowTiles * kTileFloats;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  [[maybe_unused]] ConvStep<T> conv;
  if constexpr (kEpilogue == Epilogue::kShortConv) {
    static_assert(kRows * 16 <= kThreads);
    conv.load(p, threadIdx.x / 16, row_tile * 16 + threadIdx.x % 16);
  }
#pragma unroll
  for (int j = 0; j < kOwnChains * kRowTiles; ++j) {
    const int chain = warp + j / kRowTiles * kWarps, r = j % kRowTiles;
#pragma unroll
    for (int c = 0; c < kColTiles; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 8 * c + 2 * t + i % 2, out = g + 8 * (i / 2);
        if (row >= p.m) continue;
        partial[chain * kChainFloats + r * kTileFloats + row * kPartialPitch + out] = acc[j / kRowTiles][r][c][i];
      }
    }
  }
  __syncthreads();
  const auto total = [&](int r, int row, int out, int column) {
    const float* source = partial + r * kTileFloats + row * kPartialPitch + out;
    float sum = 0.0f;
#pragma unroll
    for (int chain = 0; chain < kOwnChains * kWarps; ++chain) sum += source[chain * kChainFloats];
    const float bias = p.bias ? to_float(p.bias[column]) : 0.0f;
    // Written as one rounding: left to the compiler, the kernels for few and for many rows would not agree.
    if constexpr (W::kRowScales) return fmaf(sum, bits_to_float<T>(p.scales[column]), bias);
    return sum + bias;
  };
  if constexpr (kEpilogue == Epilogue::kSwiGlu) {
    const int half = p.n / 2;
#pragma unroll
    for (int first = 0; first < kRows * 16; first += kThreads) {
      const int i = first + threadIdx.x, out = i % 16, row = i / 16, column = row_tile * 16 + out;
      if (row >= min(p.m, kRows)) continue;
      const T result = swiglu<T>(total(0, row, out, column), total(1, row, out, half + column));
      p.y[static_cast<int64_t>(row) * half + column] = result;
    }
  } else if constexpr (kEpilogue == Epilogue::kShortConv) {
    const int channels = p.n / 3, out = threadIdx.x % 16, row = threadIdx.x / 16, channel = row_tile * 16 + out;
    if (row < min(p.m, kRows)) {
      const float b = total(0, row, out, channel), c = total(1, row, out, channels + channel);
      conv.finish(p, row, channel, b, c, total(2, row, out, 2 * channels + channel));
    }
  } else {
#pragma unroll
    for (int first = 0; first < kRowTiles * kRows * 16; first += kThreads) {
      const int i = first + threadIdx.x, out = i % 16, row = i / 16 % kRows, r = i / (16 * kRows);
      const int column = (row_tile + r) * 16 + out;
      if (r >= min(kRowTiles, rows_left) || row >= p.m || column >= p.n) continue;
      float sum = total(r, row, out, column);
      const int64_t index = static_cast<int64_t>(row) * p.n + column;
      if constexpr (kEpilogue == Epilogue::kResidual) {
        if (p.residual) sum += to_float(p.residual[index]);
      }
      const T rounded = from_float<T>(sum);
      if constexpr (W::kWideOutput) {
        if (p.wide_y) {
          p.wide_y[index] = to_float(rounded);
          continue;
        }
      }
      p.y[index] = rounded;
    }
  }
}

template <int kCount, int kRowTiles, int kColTiles>
__device__ __forceinline__ void clear(float (&acc)[kCount][kRowTiles][kColTiles][4]) {
#pragma unroll
  for (int j = 0; j < kCount * kRowTiles; ++j) {
#pragma unroll
    for (int i = 0; i < kColTiles * 4; ++i) acc[j / kRowTiles][j % kRowTiles][i / 4][i % 4] = 0.0f;
  }
}

}  // namespace hf_fastpath::linear
