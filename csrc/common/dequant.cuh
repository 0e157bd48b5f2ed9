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

// A packed word to the A fragment of its nibbles as they stand: the low bits of a 16-bit float whose others are 0 are
// an integer, in units of the smallest number that there is. The codes of row g + 8 count sixteenfold, by their place.
__device__ __forceinline__ void nibble_fragment(uint32_t word, uint32_t (&a)[4]) {
  constexpr uint32_t kRowLow = 0x000f000fu, kRowHigh = 0x00f000f0u;
  const uint32_t next = word >> 8;
  a[0] = word & kRowLow, a[1] = word & kRowHigh, a[2] = next & kRowLow, a[3] = next & kRowHigh;
}
constexpr uint32_t kNibbleOnes = 0x00010001u;  // two ones of that kind

// What makes numbers of such products again. Those of bf16 would be too small for fp32: x is scaled first.
template <typename T>
struct NibbleScale;
template <>
struct NibbleScale<__half> {
  static constexpr float kProducts = 16777216.0f;  // 2^24
  static __device__ __forceinline__ uint32_t scaled(uint32_t x) { return x; }
};
template <>
struct NibbleScale<__nv_bfloat16> {
  static constexpr float kProducts = 590295810358705651712.0f;  // 2^69: the smallest bf16 is 2^-133
  // By 2^64, exactly: what is 2^-57 or more keeps all of fp32's bits, and below 2^64 nothing overflows.
  static __device__ __forceinline__ uint32_t scaled(uint32_t x) {
    return as_bits(__hmul2(as_pair<__nv_bfloat162>(x), as_pair<__nv_bfloat162>(0x5f805f80u)));
  }
};

// A zero point as a float, and sixteen times as much, by way of bf16: the integer in a mantissa.
__device__ __forceinline__ float zero_of_row(uint32_t zero, bool high) {
  return high ? bits_to_float<__nv_bfloat16>(0x4500u | zero) - 2048.0f
              : bits_to_float<__nv_bfloat16>(0x4300u | zero) - 128.0f;
}

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
