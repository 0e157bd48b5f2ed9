// Queries, keys and values as the kernels hold them that append to a cache, and what becomes of queries and keys before
// attention: RMSNorm over the head, RoPE, the Hadamard rotation.
//
// A row is one head of one token, in kLanes lanes of a warp with 8 neighbouring channels each, so that every partner a
// channel has is in a lane of the same row, or in the same lane. All lanes of a warp come along, whether their rows are
// there or not: shuffles want them.
#pragma once

#include <cassert>

#include "../common/dequant.cuh"
#include "../common/dtype.cuh"
#include "../common/memory.cuh"
#include "../common/ptx.cuh"
#include "../common/reduce.cuh"
#include "../kernels.h"

namespace hf_fastpath::kv {

constexpr int kPerLane = 8;

enum class Side { kKey, kValue, kQuery };

// Tokens that find no room are a mistake of the host, which counts as the GPU does.
__device__ __forceinline__ void require_room(int64_t stored, int64_t capacity) {
#ifdef HF_FASTPATH_EMULATED
  if (stored > capacity) cuda_emulator::fault("tokens are appended that the cache has no room for");
#else
  assert(stored <= capacity && "tokens are appended that the cache has no room for");
#endif
}

// Eight 16-bit values, aligned to 16 bytes with kVector. Plain loads: they are of what the kernel before stored.
template <bool kVector>
__device__ __forceinline__ uint4 load_8(const void* p) {
  if constexpr (kVector) return *static_cast<const uint4*>(p);
  const uint16_t* h = static_cast<const uint16_t*>(p);
  uint32_t w[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) w[i] = h[2 * i] | static_cast<uint32_t>(h[2 * i + 1]) << 16;
  return make_uint4(w[0], w[1], w[2], w[3]);
}

template <typename T>
__device__ __forceinline__ void unpack(float (&v)[kPerLane], const uint4& bits) {
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) v[i] = bits_to_float<T>(words[i / 2] >> (16 * (i % 2)));
}

// x becomes f(x, y), word by word.
template <typename F>
__device__ __forceinline__ void for_words(uint4& x, const uint4& y, const F& f) {
  x = make_uint4(f(x.x, y.x), f(x.y, y.y), f(x.z, y.z), f(x.w, y.w));
}

template <typename T>
__device__ __forceinline__ uint4 pack(const float (&v)[kPerLane]) {
  return make_uint4(pack_floats(v[0], v[1], T()), pack_floats(v[2], v[3], T()), pack_floats(v[4], v[5], T()),
                    pack_floats(v[6], v[7], T()));
}

// Over the lanes of a row.
template <int kLanes>
__device__ __forceinline__ float row_sum(float v) {
#pragma unroll
  for (int offset = kLanes / 2; offset; offset /= 2) v += __shfl_xor_sync(kFullWarp, v, offset, kLanes);
  return v;
}
template <int kLanes>
__device__ __forceinline__ float row_max_nan(float v) {
#pragma unroll
  for (int offset = kLanes / 2; offset; offset /= 2) v = max_nan(v, __shfl_xor_sync(kFullWarp, v, offset, kLanes));
  return v;
}

// What a lane reads of a row, asked for at once.
struct RowBits {
  uint4 x, norm, cos, sin;
};

template <typename T>
__device__ __forceinline__ const T* row_begin(const KvRows& rows, int64_t batch, int64_t head, int64_t token) {
  return static_cast<const T*>(rows.data) + batch * rows.stride_batch + head * rows.stride_head +
         token * rows.stride_token;
}

template <typename T, bool kVector>
__device__ __forceinline__ uint4 load_row(const KvRows& rows, int64_t batch, int64_t head, int64_t token, int lane,
                                          int dim) {
  if (kPerLane * lane >= dim) return make_uint4(0, 0, 0, 0);
  return load_8<kVector>(row_begin<T>(rows, batch, head, token) + kPerLane * lane);
}

// The rest of RowBits, for the rows of a token; `norm` may be nullptr.
template <typename T, bool kVector>
__device__ __forceinline__ void load_transform(RowBits& bits, const KvNewTokens& p, const void* norm, int64_t batch,
                                               int64_t token, int lane) {
  bits.norm = bits.cos = bits.sin = make_uint4(0, 0, 0, 0);
  const int channel = kPerLane * lane;
  if (norm != nullptr && channel < p.dim) bits.norm = load_8<kVector>(static_cast<const T*>(norm) + channel);
  if (channel < p.rotary_dim) {
    const T* cos = static_cast<const T*>(p.cos.data) + batch * p.cos.stride_batch + token * p.cos.stride_token;
    const T* sin = static_cast<const T*>(p.sin.data) + batch * p.sin.stride_batch + token * p.sin.stride_token;
    bits.cos = load_8<kVector>(cos + channel);
    bits.sin = load_8<kVector>(sin + channel);
  }
}

template <typename T>
using PairOf = typename Pair<T>::type;

// As transformers' LlamaRMSNorm: in fp32, rounded, times the weight, rounded.
template <typename T, int kLanes>
__device__ __forceinline__ void normalize(uint4& x, const uint4& weight, float eps, int dim) {
  float v[kPerLane], sum = 0.0f;
  unpack<T>(v, x);
#pragma unroll
  for (float value : v) sum = fmaf(value, value, sum);
  const float inverse = rsqrtf(__fadd_rn(__fdiv_rn(row_sum<kLanes>(sum), static_cast<float>(dim)), eps));
#pragma unroll
  for (float& value : v) value = __fmul_rn(value, inverse);
  x = pack<T>(v);
  for_words(x, weight, [](uint32_t word, uint32_t w) {
    return as_bits(__hmul2_rn(as_pair<PairOf<T>>(word), as_pair<PairOf<T>>(w)));
  });
}

// As transformers' apply_rotary_pos_emb of the first rotary_dim channels: x * cos + rotate_half(x) * sin, each product
// and the sum rounded. (A sum of two 16-bit numbers that fp32 cannot hold is nowhere near a tie, so that one rounding
// gives what torch's two give.) The partner of a channel is half of rotary_dim away, a multiple of 8.
template <typename T, int kLanes>
__device__ __forceinline__ void turn(uint4& x, const RowBits& bits, int rotary_dim, int lane) {
  using P = PairOf<T>;
  const int half = rotary_dim / (2 * kPerLane);
  const bool first = lane < half, inside = lane < 2 * half;
  const int partner = inside ? (first ? lane + half : lane - half) : lane;
  const uint32_t sign = first ? 0x80008000u : 0;
  uint4 other = make_uint4(__shfl_sync(kFullWarp, x.x, partner, kLanes), __shfl_sync(kFullWarp, x.y, partner, kLanes),
                           __shfl_sync(kFullWarp, x.z, partner, kLanes), __shfl_sync(kFullWarp, x.w, partner, kLanes));
  if (!inside) return;
  for_words(other, bits.sin, [sign](uint32_t word, uint32_t sin) {
    return as_bits(__hmul2_rn(as_pair<P>(word ^ sign), as_pair<P>(sin)));
  });
  for_words(x, bits.cos,
            [](uint32_t word, uint32_t cos) { return as_bits(__hmul2_rn(as_pair<P>(word), as_pair<P>(cos))); });
  for_words(x, other,
            [](uint32_t along, uint32_t across) { return as_bits(__hadd2_rn(as_pair<P>(along), as_pair<P>(across))); });
}

// The matrix of hf_fastpath/ops/_rotation.py, by butterflies in fp32; `factor` is rotation_factor(dim).
template <typename T, int kLanes>
__device__ __forceinline__ void rotate(uint4& x, float factor, int dim, int lane) {
  const int block = dim & -dim;  // a multiple of 8, as dim is
  float v[kPerLane];
  unpack<T>(v, x);
#pragma unroll
  for (int stride = 1; stride < kPerLane; stride *= 2) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (i & stride) continue;
      const float low = v[i], high = v[i + stride];
      v[i] = low + high;
      v[i + stride] = low - high;
    }
  }
#pragma unroll
  for (int offset = 1; offset < kLanes; offset *= 2) {
    if (kPerLane * offset >= block) break;
    const float sign = lane & offset ? -1.0f : 1.0f;
#pragma unroll
    for (float& value : v) value = fmaf(value, sign, __shfl_xor_sync(kFullWarp, value, offset, kLanes));
  }
#pragma unroll
  for (float& value : v) value *= factor;
  x = pack<T>(v);
}

// A row of queries or keys, as attention and the cache want it.
template <typename T, int kLanes>
__device__ __forceinline__ uint4 transform(const RowBits& bits, const KvNewTokens& p, bool normalized, int lane) {
  uint4 x = bits.x;
  if (normalized) normalize<T, kLanes>(x, bits.norm, p.eps, p.dim);
  if (p.rotary_dim) turn<T, kLanes>(x, bits, p.rotary_dim, lane);
  if (p.rotation) rotate<T, kLanes>(x, p.rotation, p.dim, lane);
  return x;
}

// A transformed query goes to its place.
__device__ __forceinline__ void store_query(const KvNewTokens& p, int64_t batch, int64_t head, int64_t token, int lane,
                                            const uint4& x) {
  if (kPerLane * lane >= p.dim) return;
  const int64_t row =
      p.query_by_token ? (batch * p.tokens + token) * p.heads + head : (batch * p.heads + head) * p.tokens + token;
  reinterpret_cast<uint4*>(static_cast<uint16_t*>(p.query_out) + row * p.dim)[lane] = x;
}

// ---- division -------------------------------------------------------------------------------------------------------
// x / divisor, correctly rounded, by multiplications with what was computed once (Markstein, 1990, "Computation of
// Elementary Functions on the IBM RISC System/6000 Processor": two steps from the product with the correctly rounded
// reciprocal). For finite x and a divisor that is a positive fp16 number; quotients far below 1/2 may be inexact.
struct Divisor {
  float value, reciprocal;
  bool valid;

  __device__ __forceinline__ explicit Divisor(float divisor) {
    value = divisor;
    reciprocal = __frcp_rn(divisor);
    valid = divisor > 0.0f && divisor < __builtin_huge_valf();
  }

  __device__ __forceinline__ float divide(float x) const { return divide(x, value, reciprocal); }

  static __device__ __forceinline__ float divide(float x, float divisor, float reciprocal) {
    float quotient = __fmul_rn(x, reciprocal);
    quotient = fmaf(fmaf(-divisor, quotient, x), reciprocal, quotient);
    return fmaf(fmaf(-divisor, quotient, x), reciprocal, quotient);
  }
};

// The bits of a float whose last places hold round(x), ties to even, as a two's complement; |x| up to 2^22.
__device__ __forceinline__ uint32_t integer_bits(float x) {
  const float biased = __fadd_rn(x, 12582912.0f);  // 3 * 2^22
  return *reinterpret_cast<const uint32_t*>(&biased);
}
constexpr uint32_t kIntegerBits = 0x4b400000;  // of 0

}  // namespace hf_fastpath::kv
