// Queries, keys and values as the kernels hold them that append to a cache, and what becomes of queries and keys before
// attention: RMSNorm over the head, RoPE, the Hadamard rotation.
//
// A row is one head of one token, in kLanes lanes of a warp with 8 neighbouring channels each, so that every partner a
// channel has is in a lane of the same row, or in the same lane. All lanes of a warp come along, whether their rows are
// there or not: shuffles want them.
#pragma once

#include <cassert>

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

template <typename T>
__device__ __forceinline__ float rounded(float v) {
  return to_float(from_float<T>(v));
}

// Eight 16-bit values, aligned to 16 bytes with kVector. Plain loads: the kernel before may have stored them, and may
// still run when this one begins.
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

template <typename T, bool kVector>
__device__ __forceinline__ uint4 load_row(const KvRows& rows, int64_t batch, int64_t head, int64_t token, int lane,
                                          int dim) {
  if (kPerLane * lane >= dim) return make_uint4(0, 0, 0, 0);
  const T* row =
      static_cast<const T*>(rows.data) + batch * rows.stride_batch + head * rows.stride_head + token * rows.stride_token;
  return load_8<kVector>(row + kPerLane * lane);
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

// As transformers' LlamaRMSNorm: in fp32, rounded, times the weight, rounded.
template <typename T, int kLanes>
__device__ __forceinline__ void normalize(float (&v)[kPerLane], const uint4& weight_bits, float eps, int dim) {
  float weight[kPerLane], sum = 0.0f;
  unpack<T>(weight, weight_bits);
#pragma unroll
  for (float value : v) sum = fmaf(value, value, sum);
  const float inverse = rsqrtf(__fadd_rn(__fdiv_rn(row_sum<kLanes>(sum), static_cast<float>(dim)), eps));
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) v[i] = rounded<T>(__fmul_rn(rounded<T>(__fmul_rn(v[i], inverse)), weight[i]));
}

// As transformers' apply_rotary_pos_emb of the first rotary_dim channels: x * cos + rotate_half(x) * sin, each product
// and the sum rounded. The partner of a channel is half of rotary_dim away, a multiple of 8.
template <typename T, int kLanes>
__device__ __forceinline__ void turn(float (&v)[kPerLane], const RowBits& bits, int rotary_dim, int lane) {
  const int half = rotary_dim / (2 * kPerLane);
  const bool first = lane < half, inside = lane < 2 * half;
  const int partner = inside ? (first ? lane + half : lane - half) : lane;
  float cos[kPerLane], sin[kPerLane];
  unpack<T>(cos, bits.cos);
  unpack<T>(sin, bits.sin);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const float other = __shfl_sync(kFullWarp, v[i], partner, kLanes);
    const float along = rounded<T>(__fmul_rn(v[i], cos[i]));
    const float across = rounded<T>(__fmul_rn(first ? -other : other, sin[i]));
    if (inside) v[i] = rounded<T>(__fadd_rn(along, across));
  }
}

// The matrix of hf_fastpath/ops/_rotation.py, by butterflies; `factor` is rotation_factor(dim).
template <typename T, int kLanes>
__device__ __forceinline__ void rotate(float (&v)[kPerLane], float factor, int dim, int lane) {
  const int block = dim & -dim;  // a multiple of 8, as dim is
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
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const float other = __shfl_xor_sync(kFullWarp, v[i], offset, kLanes);
      v[i] = lane & offset ? other - v[i] : v[i] + other;
    }
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) v[i] = rounded<T>(v[i] * factor);
}

// A row of queries or keys, as attention and the cache want it.
template <typename T, int kLanes>
__device__ __forceinline__ void transform(float (&v)[kPerLane], const RowBits& bits, const KvNewTokens& p,
                                          bool normalized, int lane) {
  if (normalized) normalize<T, kLanes>(v, bits.norm, p.eps, p.dim);
  if (p.rotary_dim) turn<T, kLanes>(v, bits, p.rotary_dim, lane);
  if (p.rotation) rotate<T, kLanes>(v, p.rotation, p.dim, lane);
}

// A transformed query goes to its place.
template <typename T>
__device__ __forceinline__ void store_query(const KvNewTokens& p, int64_t batch, int64_t head, int64_t token, int lane,
                                            const float (&v)[kPerLane]) {
  if (kPerLane * lane >= p.dim) return;
  T* out = static_cast<T*>(p.query_out) + ((batch * p.heads + head) * p.tokens + token) * p.dim;
  reinterpret_cast<uint4*>(out)[lane] = pack<T>(v);
}

}  // namespace hf_fastpath::kv
