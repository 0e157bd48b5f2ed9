// How the warps of w4a16_gemm_sm90.cu make 16-bit floats of int4: (q - zero) * scale, rounded as w4a16_dequantize
// rounds.
#pragma once

#include "../common/dequant.cuh"
#include "../common/ptx_sm90.cuh"

namespace hf_fastpath {

// Of a packed word (packing.py) the nibbles of row g are taken from bits 0 to 3 and those of row g + 8 from bits 4 to
// 7, of each half, so that the two pairs of a row need one shift, by eight bits, together.
__device__ __forceinline__ uint32_t row_mask(int h) {
  return h ? 0x00f000f0 : 0x000f000f;
}

// What the weights of a group take of rows g and g + 8. All have prepare(), from the bits of a row's scale and its
// zero, and expand(), to an A fragment of weights divided by kUnit.
//
// kSymmetric: every zero is 8, which is not asked for.
template <typename T, bool kSymmetric>
struct GroupScales;

// fp16: a nibble in the low mantissa bits of 1024, or four bits higher in those of 64.
template <>
struct GroupScales<__half, false> {
  static constexpr float kUnit = 1;
  uint32_t scales[2], zeros[2];

  static __device__ __forceinline__ uint32_t base(int h) { return h ? 0x54005400 : 0x64006400; }
  __device__ __forceinline__ void prepare() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      scales[h] = __byte_perm(scales[h], 0, 0x1010);
      zeros[h] = __byte_perm(zeros[h] << 4 * h, 0, 0x1010) | base(h);
    }
  }
  __device__ __forceinline__ uint32_t weight(uint32_t word, int h) const {
    const __half2 biased = as_pair<__half2>(and_or(word, row_mask(h), base(h)));
    return as_bits(__hmul2(__hsub2(biased, as_pair<__half2>(zeros[h])), as_pair<__half2>(scales[h])));
  }
};

// bf16: the low eight bits of a bf16 whose others are 0 are an integer, times 2^-133, be it subnormal or of the
// smallest exponent. So nibbles are numbers as they are, those of row g + 8 sixteen times as large. The scale that
// makes weights of them would be too large a number; it is 2^-32 of that, and so are the weights until they were
// summed.
__device__ __forceinline__ uint32_t bf16_scale(int h) {
  return h ? 0x70007000 : 0x72007200;  // 2^(133 - 32), and a sixteenth of it
}

template <>
struct GroupScales<__nv_bfloat16, false> {
  static constexpr float kUnit = 4294967296.0f;
  uint32_t scales[2], zeros[2];

  __device__ __forceinline__ void prepare() {
    using P = __nv_bfloat162;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      scales[h] = as_bits(__hmul2(as_pair<P>(__byte_perm(scales[h], 0, 0x1010)), as_pair<P>(bf16_scale(h))));
      zeros[h] = __byte_perm(zeros[h] << 4 * h, 0, 0x1010);
    }
  }
  __device__ __forceinline__ uint32_t weight(uint32_t word, int h) const {
    using P = __nv_bfloat162;
    const P q = as_pair<P>(word & row_mask(h));
    return as_bits(__hmul2(__hsub2(q, as_pair<P>(zeros[h])), as_pair<P>(scales[h])));
  }
};

// Eight times a scale is exact, so that one instruction subtracts and multiplies and rounds once.
template <>
struct GroupScales<__nv_bfloat16, true> {
  static constexpr float kUnit = 4294967296.0f;
  uint32_t scales[2], zeros[2];  // zeros: times the scale, subtracted

  __device__ __forceinline__ void prepare() {
    using P = __nv_bfloat162;
    constexpr uint32_t kMinusEight = 0xb100b100;  // times 2^-32
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const P scale = as_pair<P>(__byte_perm(scales[h], 0, 0x1010));
      scales[h] = as_bits(__hmul2(scale, as_pair<P>(bf16_scale(h))));
      zeros[h] = as_bits(__hmul2(scale, as_pair<P>(kMinusEight)));
    }
  }
  __device__ __forceinline__ uint32_t weight(uint32_t word, int h) const {
    return fma_bf16x2(word & row_mask(h), scales[h], zeros[h]);
  }
};

// The A fragment of 16 columns.
template <typename Scales>
__device__ __forceinline__ void expand(uint32_t (&a)[4], uint32_t word, const Scales& scales) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = scales.weight(i < 2 ? word : word >> 8, i % 2);
}

}  // namespace hf_fastpath
