// Integers to 16-bit floats without conversion instructions: an integer below 2^m in the low mantissa bits of the power
// of two whose last place is 1 is that power plus the integer; one exact subtraction leaves the integer.
#pragma once

#include "dtype.cuh"
#include "ptx.cuh"

namespace hf_fastpath {

template <typename Pair>
__device__ __forceinline__ Pair as_pair(uint32_t bits) {
  return *reinterpret_cast<Pair*>(&bits);
}
template <typename Pair>
__device__ __forceinline__ uint32_t as_bits(Pair pair) {
  return *reinterpret_cast<uint32_t*>(&pair);
}

// The float whose last place is 1 and whose low mantissa bits hold a nibble: 1024 in fp16, 128 in bf16.
template <typename T>
constexpr uint32_t kIntegerBase = 0;
template <>
constexpr uint32_t kIntegerBase<__half> = 0x64006400;
template <>
constexpr uint32_t kIntegerBase<__nv_bfloat16> = 0x43004300;

// A zero point as the pair that int4_fragment subtracts.
template <typename T>
__device__ __forceinline__ uint32_t zero_pair(uint32_t zero) {
  return kIntegerBase<T> | zero | (zero << 16);
}

// A packed word (packing.py) to the A fragment of q - zero, exactly. zero_lo, zero_hi: zero_pair() of rows g and g + 8.
template <typename T>
__device__ __forceinline__ void int4_fragment(uint32_t word, uint32_t zero_lo, uint32_t zero_hi, uint32_t (&a)[4]) {
  using P = typename Pair<T>::type;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const P biased = as_pair<P>(and_or(word >> (4 * i), 0x000f000f, kIntegerBase<T>));
    a[i] = as_bits(__hsub2(biased, as_pair<P>(i % 2 ? zero_hi : zero_lo)));
  }
}

// What biased_int4_fragment() adds to every nibble.
template <typename T>
constexpr int kNibbleBias = 0;
template <>
constexpr int kNibbleBias<__half> = 64;
template <>
constexpr int kNibbleBias<__nv_bfloat16> = 128;

// A packed word to the A fragment of q + kNibbleBias, exactly: one instruction a pair, and shifts.
template <typename T>
__device__ __forceinline__ void biased_int4_fragment(uint32_t word, uint32_t (&a)[4]);

// In fp16 the last place of 64 is 1/16, so that a nibble counts in bits 4 to 7; of 1024 it would be in bits 0 to 3, but
// the larger the bias, the more of the sum's precision it takes.
template <>
__device__ __forceinline__ void biased_int4_fragment<__half>(uint32_t word, uint32_t (&a)[4]) {
  a[0] = and_or(word << 4, 0x00f000f0, 0x54005400);
#pragma unroll
  for (int i = 1; i < 4; ++i) a[i] = and_or(word >> (4 * i - 4), 0x00f000f0, 0x54005400);
}
template <>
__device__ __forceinline__ void biased_int4_fragment<__nv_bfloat16>(uint32_t word, uint32_t (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = and_or(word >> (4 * i), 0x000f000f, 0x43004300);
}

// kNibbleBias + zero as a float, by way of bf16: the integer in the mantissa of the bias.
template <typename T>
__device__ __forceinline__ float biased_zero(uint32_t zero) {
  return bits_to_float<__nv_bfloat16>(kNibbleBias<T> == 64 ? 0x4280 | zero << 1 : 0x4300 | zero);
}

// Two ones.
template <typename T>
constexpr uint32_t kOnes = 0;
template <>
constexpr uint32_t kOnes<__half> = 0x3c003c00;
template <>
constexpr uint32_t kOnes<__nv_bfloat16> = 0x3f803f80;

// Bytes 0 and 2 of a word, as signed integers, to a pair of floats, exactly; shift the word by 8 for bytes 1 and 3.
template <typename T>
__device__ __forceinline__ uint32_t int8_pair(uint32_t word);

// Flipping the sign bit adds 128, so 1024 + 128 is subtracted.
template <>
__device__ __forceinline__ uint32_t int8_pair<__half>(uint32_t word) {
  const uint32_t biased = and_xor(word, 0x00ff00ff, 0x64806480);
  return as_bits(__hsub2(as_pair<__half2>(biased), as_pair<__half2>(0x64806480)));
}

// Seven mantissa bits hold the byte without its sign; the sign bit, added to the bits of 128, makes what is subtracted
// 256.
template <>
__device__ __forceinline__ uint32_t int8_pair<__nv_bfloat16>(uint32_t word) {
  const uint32_t biased = and_or(word, 0x007f007f, kIntegerBase<__nv_bfloat16>);
  const uint32_t bias = and_or(word, 0x00800080, kIntegerBase<__nv_bfloat16>);
  return as_bits(__hsub2(as_pair<__nv_bfloat162>(biased), as_pair<__nv_bfloat162>(bias)));
}

}  // namespace hf_fastpath
