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

// int4 codes for the tensor core as they stand in their words: the low bits of a 16-bit float whose others are 0 are an
// integer, in units of the smallest number that there is. The tensor core aligns such products as if they were numbers
// of the smallest exponent, so what a code lacks to that costs bits of the sum.
//
// fragment(): a packed word to an A fragment. kRowHigh: what the codes of rows g + 8 count more than those of g, by
// their place. kOnes: two numbers that count kOnesCount, as precise as can be. prepared(): two values of x. kUnit: what
// products of all that are in units of, reversed.
template <typename T>
struct Nibbles;

// fp16: all codes in bits 4 to 7, two bits below what is precise.
template <>
struct Nibbles<__half> {
  static constexpr int kRowHigh = 1;
  static constexpr float kUnit = 1048576.0f, kOnesCount = 64;  // 2^20
  static constexpr uint32_t kOnes = 0x04000400u;

  static __device__ __forceinline__ void fragment(uint32_t word, uint32_t (&a)[4]) {
    constexpr uint32_t kCodes = 0x00f000f0u;
    a[0] = word << 4 & kCodes, a[1] = word & kCodes, a[2] = word >> 4 & kCodes, a[3] = word >> 8 & kCodes;
  }
  static __device__ __forceinline__ uint32_t prepared(uint32_t x) { return x; }
};

// bf16: in bits 0 to 3, three bits below, or 4 to 7. Products would be too small for fp32, the smallest bf16 being
// 2^-133: x comes times 2^64, exactly. Then what is 2^-57 or more keeps all bits, and below 2^64 nothing overflows.
template <>
struct Nibbles<__nv_bfloat16> {
  static constexpr int kRowHigh = 16;
  static constexpr float kUnit = 590295810358705651712.0f, kOnesCount = 128;  // 2^69
  static constexpr uint32_t kOnes = 0x00800080u;

  static __device__ __forceinline__ void fragment(uint32_t word, uint32_t (&a)[4]) {
    constexpr uint32_t kLow = 0x000f000fu, kHigh = 0x00f000f0u;
    const uint32_t next = word >> 8;
    a[0] = word & kLow, a[1] = word & kHigh, a[2] = next & kLow, a[3] = next & kHigh;
  }
  static __device__ __forceinline__ uint32_t prepared(uint32_t x) {
    return as_bits(__hmul2(as_pair<__nv_bfloat162>(x), as_pair<__nv_bfloat162>(0x5f805f80u)));
  }
};

// A zero point, below 16, as a float, kFactor (1 or 16) times: the integer in a bf16's mantissa.
template <int kFactor>
__device__ __forceinline__ float zero_as_float(uint32_t zero) {
  static_assert(kFactor == 1 || kFactor == 16);
  constexpr uint32_t kBase = kFactor == 1 ? 0x4300u : 0x4500u;  // 128, 2,048
  return bits_to_float<__nv_bfloat16>(kBase | zero) - 128.0f * kFactor;
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
