// RMSNorm of the activations, for the products of decode_linear.cuh and for rms_norm.cu: a row has the same bits in
// both.
#pragma once

#include "decode_types.cuh"

namespace hf_fastpath::linear {

// Eight warps share a row; a lane takes 8 of kColsAtOnce columns.
constexpr int kWarpsOfRow = 8, kColsAtOnce = 8 * 32 * kWarpsOfRow;

template <typename T>
__device__ __forceinline__ float add_squares(float sum, const uint4& v) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float value = bits_to_float<T>(words[i / 2] >> (16 * (i % 2)));
    sum = fmaf(value, value, sum);
  }
  return sum;
}

// 1 / rms of a row from its warps' sums.
__device__ __forceinline__ float inverse_rms(const float (&squares)[kWarpsOfRow], int columns, float eps) {
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarpsOfRow; ++w) sum += squares[w];
  return rsqrtf(sum / columns + eps);
}

// 8 values with the roundings of transformers' LlamaRMSNorm: normalized in fp32, rounded, times the weight, rounded.
template <typename T>
__device__ __forceinline__ uint4 normalized(const uint4& x, float inverse, const uint4& weight) {
  using P = typename Pair<T>::type;
  uint32_t words[4] = {x.x, x.y, x.z, x.w};
  const uint32_t weights[4] = {weight.x, weight.y, weight.z, weight.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float lo = bits_to_float<T>(words[i]) * inverse, hi = bits_to_float<T>(words[i] >> 16) * inverse;
    words[i] = as_bits(__hmul2(as_pair<P>(pack_floats(lo, hi, T())), as_pair<P>(weights[i])));
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// x of up to kRows rows and 2 * kColsAtOnce columns, normalized once for a CTA of eight warps, in shared memory: rows
// `pitch` bytes apart, columns up to the last unit's end, zeros behind the last of x.
template <int kRows, typename T>
class SharedNorm {
 public:
  // Asks for the weights, which no kernel before this one writes.
  __device__ __forceinline__ explicit SharedNorm(const Params<T>& p) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      weight_[i] = make_uint4(0, 0, 0, 0);
      if (column(i) < p.k) weight_[i] = load_early16(p.norm_weight + column(i));
    }
  }

  __device__ __forceinline__ void load(const Params<T>& p) {
#pragma unroll
    for (int j = 0; j < 2 * kRows; ++j) {
      const int row = j / 2, i = j % 2;
      x_[row][i] = make_uint4(0, 0, 0, 0);
      if (row < p.m && column(i) < p.k) x_[row][i] = load_early16(p.x + row * p.x_row_stride + column(i));
    }
  }

  // As the weight format W wants x.
  template <typename W>
  __device__ __forceinline__ void store(unsigned char* target, int pitch, int columns, const Params<T>& p) {
    __shared__ float squares[kRows][kWarpsOfRow];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const float sum = warp_sum(add_squares<T>(add_squares<T>(0.0f, x_[row][0]), x_[row][1]));
      if (threadIdx.x % 32 == 0) squares[row][threadIdx.x / 32] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (row >= p.m) break;
      const float inverse = inverse_rms(squares[row], p.k, p.eps);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (column(i) >= columns) continue;
        uint4* place = reinterpret_cast<uint4*>(target + row * pitch + sizeof(T) * column(i));
        *place = W::prepared(normalized<T>(x_[row][i], inverse, weight_[i]));
      }
    }
    __syncthreads();
  }

 private:
  static __device__ __forceinline__ int column(int i) { return 8 * static_cast<int>(threadIdx.x) + kColsAtOnce * i; }

  uint4 weight_[2], x_[kRows][2];
};

}  // namespace hf_fastpath::linear
