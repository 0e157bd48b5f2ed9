// Warp reductions. Butterfly order: every lane ends with the same bits, in every run.
#pragma once

#include "ptx.cuh"

namespace hf_fastpath {

constexpr unsigned kFullWarp = 0xffffffffu;

__device__ __forceinline__ float warp_max_nan(float v) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) v = max_nan(v, __shfl_xor_sync(kFullWarp, v, offset));
  return v;
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) v += __shfl_xor_sync(kFullWarp, v, offset);
  return v;
}

// Over the lanes that share t = lane % 4.
__device__ __forceinline__ float max_over_g(float v) {
#pragma unroll
  for (int offset = 16; offset >= 4; offset /= 2) v = fmaxf(v, __shfl_xor_sync(kFullWarp, v, offset));
  return v;
}
__device__ __forceinline__ float sum_over_g(float v) {
#pragma unroll
  for (int offset = 16; offset >= 4; offset /= 2) v += __shfl_xor_sync(kFullWarp, v, offset);
  return v;
}

}  // namespace hf_fastpath
