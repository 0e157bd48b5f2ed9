// A row of x for the integer tensor cores, exactly: int4 weights are integers, and so is x but for powers of two.
//
// In a unit of 128 columns x is an integer times a power of two, the unit's factor: the integer has 22 bits, so that
// what is at least 2^-13 of the unit's largest value keeps all bits of bf16 (2^-10: of fp16), and the error of the
// rest is at most 2^-22 of the largest. The integer has three signed digits to the base 256, each of which is a column
// of the B operand of mma.m16n8k32. A nibble is a byte of the A operand as it stands: of 8 codes two instructions make
// two registers, where floats take seven and twice as many products.
#pragma once

#include "dequant.cuh"
#include "memory.cuh"
#include "ptx.cuh"
#include "reduce.cuh"

namespace hf_fastpath::digits {

constexpr int kDigits = 3;
constexpr int kUnitCols = 128;
constexpr int kPlaneGap = 32;  // bytes between planes, which keep the planes' parts of a unit in different banks

// A row in shared memory: a plane of bytes for each digit, and the units' factors. Four columns lie in the order 0 2 1
// 3, as a packed word has them.
struct Row {
  unsigned char* planes;
  float* factors;
  int pitch;

  static __host__ __device__ __forceinline__ int bytes(int units) {
    return kDigits * (units * kUnitCols + kPlaneGap) + (units + 3) / 4 * 16;
  }
  __device__ __forceinline__ Row(unsigned char* memory, int units)
      : planes(memory),
        factors(reinterpret_cast<float*>(memory + kDigits * (units * kUnitCols + kPlaneGap))),
        pitch(units * kUnitCols + kPlaneGap) {}
};

// Bits of the largest |x| of eight 16-bit floats: they are ordered as integers are, NaN last.
__device__ __forceinline__ uint32_t largest_bits(const uint4& x) {
  constexpr uint32_t kNoSigns = 0x7fff7fffu;
  const uint32_t pair = max_u16x2(max_u16x2(x.x & kNoSigns, x.y & kNoSigns), max_u16x2(x.z & kNoSigns, x.w & kNoSigns));
  return max(pair & 0xffffu, pair >> 16);
}

// A unit's scale, of its largest value. An infinity or a NaN makes all of its products NaN.
struct Scale {
  float inverse, factor;

  template <typename T>
  static __device__ __forceinline__ Scale of(uint32_t largest) {
    constexpr int kBits = 20;  // below the largest value's highest one
    const uint32_t bits = __float_as_uint(bits_to_float<T>(largest));
    const int exponent = static_cast<int>(bits >> 23), own = max(exponent - kBits, 1);
    const float factor = __uint_as_float(static_cast<uint32_t>(exponent == 255 ? 255 : own) << 23);
    return {__uint_as_float(static_cast<uint32_t>(254 - own) << 23), exponent == 255 ? factor - factor : factor};
  }
};

// Eight columns of x, of which `column` is the first.
template <typename T>
__device__ __forceinline__ void store_digits(const Row& row, const uint4& x, int column, float inverse) {
  // Rounds to an integer in the mantissa's low bits; 0x8080 makes the lower two digits that are below 0 carry.
  constexpr float kToInteger = 12582912.0f + 0x8080;
  const uint32_t words[4] = {x.x, x.y, x.z, x.w};
  uint32_t value[8], digit[kDigits][2];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float v = bits_to_float<T>(words[i / 2] >> (16 * (i % 2)));
    value[i] = __float_as_uint(fmaf(v, inverse, kToInteger));
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t* v = value + 4 * half;  // in the order 0 2 1 3
    const uint32_t low = __byte_perm(v[0], v[2], 0x5140), high = __byte_perm(v[1], v[3], 0x5140);
    const uint32_t top = __byte_perm(__byte_perm(v[0], v[2], 0x0062), __byte_perm(v[1], v[3], 0x0062), 0x5410);
    digit[0][half] = __byte_perm(low, high, 0x5410) ^ 0x80808080u;
    digit[1][half] = __byte_perm(low, high, 0x7632) ^ 0x80808080u;
    digit[2][half] = ((top | 0x80808080u) - 0x40404040u) ^ 0x80808080u;  // each byte less 64, which no byte borrows
  }
#pragma unroll
  for (int d = 0; d < kDigits; ++d) {
    *reinterpret_cast<uint2*>(row.planes + d * row.pitch + column) = make_uint2(digit[d][0], digit[d][1]);
  }
}

// The same by neighbouring lanes that have a unit's columns, 8 * kParts each; all lanes of a warp take part.
template <typename T, int kParts>
__device__ __forceinline__ void store_unit(const Row& row, const uint4 (&x)[kParts], int column, bool there) {
  constexpr int kLanes = kUnitCols / (8 * kParts);
  uint32_t largest = 0;
#pragma unroll
  for (const uint4& part : x) largest = max(largest, largest_bits(part));
#pragma unroll
  for (int offset = kLanes / 2; offset; offset /= 2) {
    largest = max(largest, __shfl_xor_sync(kFullWarp, largest, offset));
  }
  if (!there) return;
  const Scale scale = Scale::of<T>(largest);
#pragma unroll
  for (int i = 0; i < kParts; ++i) store_digits<T>(row, x[i], column + 8 * i, scale.inverse);
  if (column % kUnitCols == 0) row.factors[column / kUnitCols] = scale.factor;
}

// `rows` rows of x one after the other, their columns a multiple of kUnitCols, to rows in `memory`, by kThreads
// threads. loaded() is called once, when the first of x has been asked for.
constexpr int kAtOnce = 2;  // runs of 32 columns that a thread has in registers
template <int kThreads, typename T, typename Loaded>
__device__ __forceinline__ void store_rows(unsigned char* memory, const T* x, int rows, int columns, Loaded loaded) {
  const int runs = columns / 32, all = rows * runs, row_bytes = Row::bytes(columns / kUnitCols);
  bool first = true;
  for (int begin = 0; begin < all; begin += kAtOnce * kThreads) {
    uint4 v[kAtOnce][4];
    const auto run = [&](int i) { return begin + i * kThreads + static_cast<int>(threadIdx.x); };
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        v[i][j] = make_uint4(0, 0, 0, 0);
        if (run(i) < all) v[i][j] = load_early16(x + static_cast<int64_t>(run(i)) * 32 + 8 * j);
      }
    }
    if (first) loaded();
    first = false;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (begin + i * kThreads >= all) break;
      const int row = rows == 1 ? 0 : run(i) / runs, column = (run(i) - row * runs) * 32;
      store_unit<T>(Row(memory + row * row_bytes, columns / kUnitCols), v[i], column, run(i) < all);
    }
  }
}

// A lane's part of the B operand of a unit. Digit d is in the columns 2d of the operand, so that a lane t has the
// products with digit t in its registers 0 and 2 of the result; the others are a digit once more, and not used.
struct Unit {
  uint2 b[4];
  float factor;

  __device__ __forceinline__ Unit(const unsigned char* b_from, const float* factor_from) {
#pragma unroll
    for (int j = 0; j < 4; ++j) b[j] = *reinterpret_cast<const uint2*>(b_from + 32 * j);
    factor = *factor_from;
  }
};

// Where a lane finds its parts.
struct Lane {
  int tile, scales, zeros;  // offsets in a stage
  const unsigned char* b;
  float weight;  // of the lane's digit

  template <typename Stage>
  static __device__ __forceinline__ Lane of(const Row& row, int lane) {
    const int g = lane / 4, t = lane % 4;
    Lane l = {16 * lane, static_cast<int>(offsetof(Stage, scales)) + 2 * g,
              static_cast<int>(offsetof(Stage, zeros)) + g, row.planes + min(g / 2, kDigits - 1) * row.pitch + 8 * t,
              t == 0   ? 1.0f
              : t == 1 ? 256.0f
              : t == 2 ? 65536.0f
                       : 0.0f};
    keep_in_register(l.tile), keep_in_register(l.scales), keep_in_register(l.zeros);
    return l;
  }
};

// acc += the products of a unit of weights with a lane's digit, of outputs g and g + 8 of each tile. The codes of
// outputs g + 8 are taken 16 times, where they stand in their bytes; sums of 128 products are below 2^23.
template <typename W, int kTiles>
__device__ __forceinline__ void multiply(float (&acc)[kTiles][2], const unsigned char* stage, const Lane& lane,
                                         const Unit& x) {
  using T = typename W::T;
  constexpr uint32_t kOnes = 0x01010101u, kLow = 0x0f0f0f0fu, kHigh = 0xf0f0f0f0u;
  constexpr int kRuns = 4 / W::kGroups;  // of 32 columns in a group
  int sums[W::kGroups][4] = {};
#pragma unroll
  for (int j = 0; j < 4; ++j) mma_m16n8k32(sums[j / kRuns], {kOnes, kOnes, kOnes, kOnes}, x.b[j].x, x.b[j].y);
  const float factor_high = x.factor * 0.0625f;
#pragma unroll
  for (int r = 0; r < kTiles; ++r) {
    const uint4 low = *reinterpret_cast<const uint4*>(stage + lane.tile + 1024 * r),
                high = *reinterpret_cast<const uint4*>(stage + lane.tile + 1024 * r + 512);
    const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int group = 0; group < W::kGroups; ++group) {
      const int at = r * W::kGroups + group;
      const uint16_t* const scales = reinterpret_cast<const uint16_t*>(stage + lane.scales + 32 * at);
      const int zero = W::kHasZeros ? stage[lane.zeros + 16 * at] : 8;
      const int zero_high = W::kHasZeros ? stage[lane.zeros + 16 * at + 8] : 8;
      int sum[4] = {};
#pragma unroll
      for (int j = group * kRuns; j < (group + 1) * kRuns; ++j) {
        const uint32_t first = words[2 * j], second = words[2 * j + 1];
        mma_m16n8k32(sum, {first & kLow, first & kHigh, second & kLow, second & kHigh}, x.b[j].x, x.b[j].y);
      }
      const int own = sums[group][0];
      const float scale = bits_to_float<T>(scales[0]) * x.factor,
                  scale_high = bits_to_float<T>(scales[8]) * factor_high;
      acc[r][0] = fmaf(static_cast<float>(sum[0] - zero * own), scale, acc[r][0]);
      acc[r][1] = fmaf(static_cast<float>(sum[2] - zero_high * (16 * own)), scale_high, acc[r][1]);
    }
  }
}

// Puts the outputs of all digits together: 16 floats of each tile, by the lanes t = 0; clears acc.
template <int kTiles>
__device__ __forceinline__ void store_sums(float (&acc)[kTiles][2], float* target, const Lane& own, int lane) {
#pragma unroll
  for (int j = 0; j < 2 * kTiles; ++j) {
    float& sum = acc[j / 2][j % 2];
    float value = lane % 4 < kDigits ? sum * own.weight : 0.0f;
#pragma unroll
    for (int offset = 1; offset < 4; offset *= 2) value += __shfl_xor_sync(kFullWarp, value, offset);
    if (lane % 4 == 0) target[j / 2 * 16 + j % 2 * 8 + lane / 4] = value;
    sum = 0.0f;
  }
}

}  // namespace hf_fastpath::digits
