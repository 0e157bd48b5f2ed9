// LFM2's gated short convolution as the epilogue of its first projection: see csrc/short_conv.cu, whose roundings these
// are. A thread has one channel of one row.
#pragma once

#include "decode_types.cuh"

namespace hf_fastpath::linear {

// Asks for what a block's convolution needs, which other kernels than the one before this one wrote.
template <int kRows, typename T>
__device__ __forceinline__ void prefetch_conv(const Params<T>& p, int row_tile) {
  const int row = threadIdx.x / 16, channel = row_tile * 16 + threadIdx.x % 16;
  if (row >= min(p.m, kRows)) return;
  prefetch_l2(p.conv.state + (static_cast<int64_t>(row) * (p.n / 3) + channel) * p.conv.taps);
  if (row == 0) prefetch_l2(p.conv.weight + static_cast<int64_t>(channel) * p.conv.taps);
}

// Loaded before the sums are there, since it comes from far.
template <typename T>
struct ConvStep {
  T past[kMaxConvTaps];  // inputs, the oldest first
  T weight[kMaxConvTaps];
  float bias;
  bool real;

  __device__ __forceinline__ void load(const Params<T>& p, int row, int channel) {
    if (row >= p.m) return;
    const T* state = p.conv.state + (static_cast<int64_t>(row) * (p.n / 3) + channel) * p.conv.taps;
    const T* taps = p.conv.weight + static_cast<int64_t>(channel) * p.conv.taps;
    bias = p.conv.bias ? to_float(p.conv.bias[channel]) : 0.0f;
    real = p.conv.mask == nullptr || p.conv.mask[row * p.conv.mask_stride];
#pragma unroll
    for (int i = 0; i < kMaxConvTaps; ++i) {
      if (i < p.conv.taps) past[i] = state[i], weight[i] = taps[i];
    }
  }

  // Puts out C times the convolution with B x as its latest input, and moves the state on, unless the row is padding.
  __device__ __forceinline__ void finish(const Params<T>& p, int row, int channel, float b, float c, float x) const {
    const int channels = p.n / 3, taps = p.conv.taps;
    const float product = to_float(from_float<T>(b)) * to_float(from_float<T>(x));
    const T latest = from_float<T>(real ? product : 0.0f);
    T* state = p.conv.state + (static_cast<int64_t>(row) * channels + channel) * taps;
    float sum = bias;
#pragma unroll
    for (int i = 0; i < kMaxConvTaps; ++i) {
      if (i >= taps) continue;
      const T input = i + 1 < taps ? past[i + 1 < kMaxConvTaps ? i + 1 : i] : latest;
      sum = fmaf(to_float(input), to_float(weight[i]), sum);
      if (real) state[i] = input;
    }
    const T gated = from_float<T>(to_float(from_float<T>(c)) * to_float(from_float<T>(sum)));
    p.y[static_cast<int64_t>(row) * channels + channel] = gated;
  }
};

}  // namespace hf_fastpath::linear
