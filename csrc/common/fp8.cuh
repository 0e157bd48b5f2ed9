// E4M3: conversions with torch's roundings, and the scales of hf_fastpath/ops/kv_fp8_append.py.
#pragma once

#include <cuda_fp8.h>

#include "dtype.cuh"

namespace hf_fastpath {

// The smallest power of two by which `largest` divided is at most 448; 1 for 0, and for what is not finite.
__device__ __forceinline__ float power_of_two_scale(float largest, int least_exponent, int greatest_exponent) {
  const float quotient = __fdiv_rn(largest, 448.0f);
  int exponent = 0;
  if (quotient > 0.0f && quotient < __builtin_huge_valf()) {
    if (frexpf(quotient, &exponent) == 0.5f) --exponent;
  }
  return ldexpf(1.0f, min(max(exponent, least_exponent), greatest_exponent));
}

// To nearest, ties to even. What is too large, or no number, becomes NaN (the conversion instruction gives 448) when
// `any_too_large` is set, which says that there may be such values.
__device__ __forceinline__ uint32_t fp8_bits(float lo, float hi, bool any_too_large) {
  uint32_t bits = __nv_cvt_float2_to_fp8x2(make_float2(lo, hi), __NV_SATFINITE, __NV_E4M3);
  if (any_too_large) {
    if (!(fabsf(lo) <= 464.0f)) bits = (bits & 0xff80) | 0x7f;
    if (!(fabsf(hi) <= 464.0f)) bits = (bits & 0x80ff) | 0x7f00;
  }
  return bits;
}

// Eight values, each divided by a power of two; `largest`: no magnitude of them is greater.
__device__ __forceinline__ uint2 fp8_bits_8(const float (&v)[8], float scale, float largest) {
  const float factor = __fdiv_rn(1.0f, scale);
  const bool any_too_large = !(largest * factor <= 448.0f);
  uint32_t words[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float* x = v + 4 * i;
    words[i] = fp8_bits(__fmul_rn(x[0], factor), __fmul_rn(x[1], factor), any_too_large) |
               fp8_bits(__fmul_rn(x[2], factor), __fmul_rn(x[3], factor), any_too_large) << 16;
  }
  return make_uint2(words[0], words[1]);
}

// The lower two bytes of a word, exactly.
__device__ __forceinline__ float2 fp8_to_floats(uint32_t bits) {
  const __half2_raw pair = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(bits), __NV_E4M3);
  return __half22float2(__half2(pair));
}

}  // namespace hf_fastpath
