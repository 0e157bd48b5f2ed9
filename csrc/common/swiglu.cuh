// SwiGLU of pairs of 16-bit values.
#pragma once

#include "decode_epilogue.cuh"

namespace hf_fastpath {

template <typename T>
__device__ __forceinline__ uint32_t swiglu_pair(uint32_t gates, uint32_t ups) {
  const T lo = linear::swiglu<T>(bits_to_float<T>(gates), bits_to_float<T>(ups));
  const T hi = linear::swiglu<T>(bits_to_float<T>(gates >> 16), bits_to_float<T>(ups >> 16));
  return pack_floats(to_float(lo), to_float(hi), T());
}

template <typename T>
__device__ __forceinline__ uint4 swiglu_pairs(const uint4& gates, const uint4& ups) {
  return make_uint4(swiglu_pair<T>(gates.x, ups.x), swiglu_pair<T>(gates.y, ups.y), swiglu_pair<T>(gates.z, ups.z),
                    swiglu_pair<T>(gates.w, ups.w));
}

}  // namespace hf_fastpath
