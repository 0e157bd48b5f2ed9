// Steps of a fast Walsh-Hadamard transform (hf_fastpath/ops/rotation.py): for every stride, a power of two below the
// block size, elements e and e ^ stride become their sum (at the lower index) and their difference.
#pragma once

#include "reduce.cuh"

namespace hf_fastpath {

// The size of the blocks that a head of `dim` is transformed in: the largest power of two that divides it.
__device__ __forceinline__ int hadamard_block(int dim) {
  return dim & -dim;
}

// What makes the transform of a block orthonormal.
__device__ __forceinline__ float hadamard_scale(int block) {
  return __frcp_rn(__fsqrt_rn(static_cast<float>(block)));
}

// A step between registers: elements i and i ^ kStep of each lane.
template <int kStep, int kCount>
__device__ __forceinline__ void hadamard_registers(float (&v)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i & kStep) continue;
    const float low = v[i], high = v[i + kStep];
    v[i] = low + high;
    v[i + kStep] = low - high;
  }
}

// A step between lanes: lane and lane ^ step, element by element.
template <int kCount>
__device__ __forceinline__ void hadamard_lanes(float (&v)[kCount], int step, int lane) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float other = __shfl_xor_sync(kFullWarp, v[i], step);
    v[i] = lane & step ? other - v[i] : v[i] + other;
  }
}

}  // namespace hf_fastpath
