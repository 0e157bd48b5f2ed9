// RMSNorm of the activations, inside the products of decode_linear.cuh.
#pragma once

#include "decode_types.cuh"

namespace hf_fastpath::linear {

// 1 / rms of rows g (and g + 8) of x; 0 for rows that are not there. Every CTA computes it for itself, eight warps
// sharing a row whatever the number of warps and rows.
template <int kWarps, typename T, int kColTiles>
__device__ __forceinline__ void inverse_rms(float (&inverse)[kColTiles], const Params<T>& p) {
  constexpr int kWarpsOfRow = 8;
  __shared__ float squares[kMaxLinearRows][kWarpsOfRow];
  const int warp = threadIdx.x / 32 % kWarpsOfRow, lane = threadIdx.x % 32;
  for (int row = threadIdx.x / 32 / kWarpsOfRow; row < p.m; row += kWarps / kWarpsOfRow) {
    float sum = 0.0f;
    for (int col = (32 * warp + lane) * 8; col < p.k; col += 32 * kWarpsOfRow * 8) {
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
      for (int w = 0; w < kWarpsOfRow; ++w) sum += squares[row][w];
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

}  // namespace hf_fastpath::linear
