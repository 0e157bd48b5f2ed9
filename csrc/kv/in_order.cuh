// Formats of append_tokens.cuh whose entries are the tokens in their order.
#pragma once

#include "append_tokens.cuh"

namespace hf_fastpath::kv {

// What formats share whose entries are the tokens in their order.
struct InOrder {
  static constexpr int kCountStride = 1;

  template <typename Storage>
  static __device__ __forceinline__ int64_t place(const Storage&, const KvNewTokens& p, int64_t, int stored) {
    require_room(static_cast<int64_t>(stored) + p.tokens, p.capacity);
    return stored;
  }
  template <typename Storage>
  static __device__ __forceinline__ void finish(const Storage&, int64_t, int) {}
};

// One fp16 scale a token and head. Bit-identical to the reference in hf_fastpath/ops/kv_int8_append.py, hence the
// explicit IEEE divisions and roundings: they hold whatever the compiler's fast-math flags are.
struct Int8 : InOrder {
  using Storage = KvInt8Storage;
  struct Row {
    uint2 bytes;
    __half scale;
  };

  template <typename T, int kLanes>
  static __device__ __forceinline__ Row quantize(const uint4& x) {
    float v[kPerLane], largest = 0.0f;
    unpack<T>(v, x);
#pragma unroll
    for (float value : v) largest = max_nan(largest, fabsf(value));
    Row row;
    row.scale = __float2half_rn(__fdiv_rn(row_max_nan<kLanes>(largest), 127.0f));
    const Divisor scale(__half2float(row.scale));
    uint32_t q[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      q[i] = integer_bits(fminf(fmaxf(scale.divide(v[i]), -127.0f), 127.0f));
    }
    // The lowest bytes; all 0 where the scale is 0, infinite or no number.
    row.bytes = make_uint2(__byte_perm(__byte_perm(q[0], q[1], 0x40), __byte_perm(q[2], q[3], 0x40), 0x5410),
                           __byte_perm(__byte_perm(q[4], q[5], 0x40), __byte_perm(q[6], q[7], 0x40), 0x5410));
    if (!scale.valid) row.bytes = make_uint2(0, 0);
    return row;
  }
  static __device__ __forceinline__ void store(const Storage& s, Side side, int64_t entry, int dim, int lane,
                                               const Row& row) {
    const KvQuantizedSide& target = side == Side::kKey ? s.key : s.value;
    reinterpret_cast<uint2*>(static_cast<int8_t*>(target.data) + entry * dim)[lane] = row.bytes;
    if (lane == 0) static_cast<__half*>(target.scale)[entry] = row.scale;
  }
};

// In full precision: nothing is rounded but what the transform of keys rounds.
struct Plain : InOrder {
  using Storage = KvStaticStorage;
  using Row = uint4;

  template <typename T, int kLanes>
  static __device__ __forceinline__ Row quantize(const uint4& x) {
    return x;
  }
  static __device__ __forceinline__ void store(const Storage& s, Side side, int64_t entry, int dim, int lane,
                                               const Row& row) {
    uint16_t* data = static_cast<uint16_t*>(side == Side::kKey ? s.keys : s.values);
    reinterpret_cast<uint4*>(data + entry * dim)[lane] = row;
  }
};

}  // namespace hf_fastpath::kv
