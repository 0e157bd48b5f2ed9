// 4-bit keys and values (KIVI): quantize into the cache, and back to floats. Keys share a scale along the tokens of a
// group, channel by channel, values along up to 64 channels of a token. hf_fastpath/caches/int4.py has the layout;
// bit-identical to the references in hf_fastpath/ops/kv_int4_append.py and kv_int4_dequantize.py.
#include "kv/append_groups.cuh"
#include "kv/expand.cuh"

namespace hf_fastpath {
namespace {

constexpr int kOctet = kv::kPerLane;
static_assert(kv::kTokensPerLane == 8, "a lane's tokens make one word of a value's channel");

__device__ __forceinline__ float min_nan(float a, float b) {
  return -max_nan(-a, -b);
}

// Codes 0 to 15 and what they stand for: x is about code * step + low, both fp16 numbers.
struct Range {
  kv::Divisor step;
  float low;

  __device__ __forceinline__ Range(float least, float greatest) : step(step_of(least, greatest)) {
    low = to_float(__float2half_rn(least));
  }
  static __device__ __forceinline__ float step_of(float least, float greatest) {
    return to_float(__float2half_rn(kv::Divisor::divide(__fsub_rn(greatest, least), 15.0f, 1.0f / 15.0f)));
  }

  // The code in the last places of kv::kIntegerBits.
  __device__ __forceinline__ uint32_t code_bits(float x) const {
    const float code = fminf(fmaxf(step.divide(__fsub_rn(x, low)), 0.0f), 15.0f);
    return kv::integer_bits(step.valid ? code : 0.0f);
  }
};

// What adding code_bits() << 4 * i for i = 0 to 7 adds besides the codes.
constexpr uint32_t kPackingExcess = kv::kIntegerBits * 0x11111111u;

struct Int4 {
  static constexpr int kThreadsPerSm = 640;
  template <int kLanes>
  struct Shared {
    float least[kv::kMaxWarps<kLanes>][kOctet * kLanes], greatest[kv::kMaxWarps<kLanes>][kOctet * kLanes];
  };

  // A lane's eight channels over all tokens of the group.
  template <int kLanes>
  static __device__ __forceinline__ void reduce_over_tokens(Shared<kLanes>& shared, float (&least)[kOctet],
                                                            float (&greatest)[kOctet], int lane) {
    const int warp = threadIdx.x / 32;
#pragma unroll
    for (int c = 0; c < kOctet; ++c) {
#pragma unroll
      for (int offset = kLanes; offset < 32; offset *= 2) {
        least[c] = min_nan(least[c], __shfl_xor_sync(kFullWarp, least[c], offset));
        greatest[c] = max_nan(greatest[c], __shfl_xor_sync(kFullWarp, greatest[c], offset));
      }
      if (threadIdx.x % 32 < kLanes) {
        shared.least[warp][kOctet * lane + c] = least[c];
        shared.greatest[warp][kOctet * lane + c] = greatest[c];
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int other = 0; other < blockDim.x / 32; ++other) {
#pragma unroll
      for (int c = 0; c < kOctet; ++c) {
        least[c] = min_nan(least[c], shared.least[other][kOctet * lane + c]);
        greatest[c] = max_nan(greatest[c], shared.greatest[other][kOctet * lane + c]);
      }
    }
  }

  template <typename T, int kLanes>
  static __device__ __forceinline__ void quantize_keys(const KvGroupedStorage& s, Shared<kLanes>& shared,
                                                       const KvNewTokens& p, int64_t pair, int64_t first,
                                                       const kv::LaneRows<kLanes>& rows, int slot, int lane) {
    float least[kOctet], greatest[kOctet];
    kv::unpack<T>(least, rows[0]);
    kv::unpack<T>(greatest, rows[0]);
#pragma unroll
    for (int t = 1; t < 8; ++t) {
      float v[kOctet];
      kv::unpack<T>(v, rows[t]);
#pragma unroll
      for (int c = 0; c < kOctet; ++c) {
        least[c] = min_nan(least[c], v[c]);
        greatest[c] = max_nan(greatest[c], v[c]);
      }
    }
    reduce_over_tokens<kLanes>(shared, least, greatest, lane);
    if (kOctet * lane >= p.dim) return;
    const Range ranges[kOctet] = {{least[0], greatest[0]}, {least[1], greatest[1]}, {least[2], greatest[2]},
                                  {least[3], greatest[3]}, {least[4], greatest[4]}, {least[5], greatest[5]},
                                  {least[6], greatest[6]}, {least[7], greatest[7]}};
    float steps[kOctet], lows[kOctet];
#pragma unroll
    for (int c = 0; c < kOctet; ++c) steps[c] = ranges[c].step.value, lows[c] = ranges[c].low;
    const int64_t token = pair * p.capacity + first;
    if (slot == 0) {
      __half* params = static_cast<__half*>(s.quantized[0].scale) + token / s.group * 2 * p.dim;
      reinterpret_cast<uint4*>(params)[lane] = kv::pack<__half>(steps);
      reinterpret_cast<uint4*>(params + p.dim)[lane] = kv::pack<__half>(lows);
    }
    uint8_t* data = static_cast<uint8_t*>(s.quantized[0].data) + (token + 8 * slot) * (p.dim / 2);
#pragma unroll
    for (int t = 0; t < 8; ++t) {
      float v[kOctet];
      kv::unpack<T>(v, rows[t]);
      uint32_t word = -kPackingExcess;
#pragma unroll
      for (int c = 0; c < kOctet; ++c) word += ranges[c].code_bits(v[c]) << (4 * c);
      reinterpret_cast<uint32_t*>(data + t * (p.dim / 2))[lane] = word;
    }
  }

  // A token's range over the lanes of a part.
  template <int kLanes>
  static __device__ __forceinline__ Range range_of_part(float least, float greatest, int part_lanes, int lane) {
    if ((part_lanes & (part_lanes - 1)) == 0) {
      for (int offset = 1; offset < part_lanes; offset *= 2) {
        least = min_nan(least, __shfl_xor_sync(kFullWarp, least, offset, kLanes));
        greatest = max_nan(greatest, __shfl_xor_sync(kFullWarp, greatest, offset, kLanes));
      }
      return Range(least, greatest);
    }
    const int begin = lane / part_lanes * part_lanes;
    float all_least = least, all_greatest = greatest;
    for (int i = 0; i < part_lanes; ++i) {  // lanes beyond the head read anything, and store nothing
      const int other = min(begin + i, kLanes - 1);
      all_least = min_nan(all_least, __shfl_sync(kFullWarp, least, other, kLanes));
      all_greatest = max_nan(all_greatest, __shfl_sync(kFullWarp, greatest, other, kLanes));
    }
    return Range(all_least, all_greatest);
  }

  template <typename T, int kLanes>
  static __device__ __forceinline__ void quantize_values(const KvGroupedStorage& s, const KvNewTokens& p, int64_t pair,
                                                         int64_t first, const kv::LaneRows<kLanes>& rows, int slot,
                                                         int lane) {
    const int parts = s.value_parts, part_lanes = p.dim / parts / kOctet;
    uint32_t words[kOctet];
#pragma unroll
    for (uint32_t& word : words) word = -kPackingExcess;
    float steps[8], lows[8];
#pragma unroll
    for (int t = 0; t < 8; ++t) {
      float v[kOctet];
      kv::unpack<T>(v, rows[t]);
      float least = v[0], greatest = v[0];
#pragma unroll
      for (int c = 1; c < kOctet; ++c) {
        least = min_nan(least, v[c]);
        greatest = max_nan(greatest, v[c]);
      }
      const Range range = range_of_part<kLanes>(least, greatest, part_lanes, lane);
#pragma unroll
      for (int c = 0; c < kOctet; ++c) words[c] += range.code_bits(v[c]) << (4 * t);
      steps[t] = range.step.value, lows[t] = range.low;
    }
    if (kOctet * lane >= p.dim) return;
    const int64_t token = pair * p.capacity + first;
    uint4* data = reinterpret_cast<uint4*>(static_cast<uint8_t*>(s.quantized[1].data) +
                                           ((token / 8 + slot) * p.dim + kOctet * lane) * 4);
    data[0] = make_uint4(words[0], words[1], words[2], words[3]);
    data[1] = make_uint4(words[4], words[5], words[6], words[7]);
    if (lane % part_lanes == 0) {
      __half* params = static_cast<__half*>(s.quantized[1].scale) +
                       (token / s.group * 2 * parts + lane / part_lanes) * s.group + 8 * slot;
      *reinterpret_cast<uint4*>(params) = kv::pack<__half>(steps);
      *reinterpret_cast<uint4*>(params + parts * s.group) = kv::pack<__half>(lows);
    }
  }

  template <typename T, int kLanes>
  static __device__ __forceinline__ void quantize(const KvGroupedStorage& s, Shared<kLanes>& shared, int side,
                                                  const KvNewTokens& p, int64_t pair, int64_t first,
                                                  const kv::LaneRows<kLanes>& rows, int slot, int lane) {
    if (side == 0) {
      quantize_keys<T, kLanes>(s, shared, p, pair, first, rows, slot, lane);
    } else {
      quantize_values<T, kLanes>(s, p, pair, first, rows, slot, lane);
    }
  }
};

// code * scale + low of eight codes, the first in the lowest bits.
template <typename T>
__device__ __forceinline__ uint4 expand_octet(const uint32_t (&codes)[kOctet], const float (&scale)[kOctet],
                                              const float (&low)[kOctet]) {
  float v[kOctet];
#pragma unroll
  for (int c = 0; c < kOctet; ++c) v[c] = __fadd_rn(__fmul_rn(static_cast<float>(codes[c]), scale[c]), low[c]);
  return kv::pack<T>(v);
}

template <typename T>
__global__ void __launch_bounds__(kv::kExpandThreads) kv_int4_keys_kernel(const __grid_constant__ KvExpandArgs p) {
  const kv::ExpandPlace<1> place(p);
  if (place.token >= place.stop) return;
  if (place.is_sink || place.token >= place.quantized) {
    place.template store<T>(p, place.token, place.template full_row<T>(p, place.token));
    return;
  }
  const int64_t entry = place.pair * p.capacity + place.token;
  const uint8_t* data = static_cast<const uint8_t*>(p.quantized.data) + (entry * p.dim + place.channel) / 2;
  const uint32_t word = *reinterpret_cast<const uint32_t*>(data);
  const __half* params = static_cast<const __half*>(p.quantized.scale) + entry / p.group * 2 * p.dim + place.channel;
  float scale[kOctet], low[kOctet];
  kv::unpack<__half>(scale, *reinterpret_cast<const uint4*>(params));
  kv::unpack<__half>(low, *reinterpret_cast<const uint4*>(params + p.dim));
  uint32_t codes[kOctet];
#pragma unroll
  for (int c = 0; c < kOctet; ++c) codes[c] = word >> (4 * c) & 15;
  place.template store<T>(p, place.token, expand_octet<T>(codes, scale, low));
}

template <typename T>
__global__ void __launch_bounds__(kv::kExpandThreads) kv_int4_values_kernel(const __grid_constant__ KvExpandArgs p) {
  const kv::ExpandPlace<8> place(p);
  if (place.token >= place.stop) return;
  if (place.is_sink || place.token >= place.quantized) {
    const int64_t stop = place.is_sink ? place.token + 1 : min(place.token + 8, place.stop);
    for (int64_t token = max(place.token, place.start); token < stop; ++token) {
      place.template store<T>(p, token, place.template full_row<T>(p, token));
    }
    return;
  }
  const int64_t entry = place.pair * p.capacity + place.token;
  const int parts = p.value_parts, part = place.channel / (p.dim / parts);
  const uint4* data = reinterpret_cast<const uint4*>(static_cast<const uint8_t*>(p.quantized.data) +
                                                     (entry / 8 * p.dim + place.channel) * 4);
  const uint4 lower = data[0], upper = data[1];
  const uint32_t words[kOctet] = {lower.x, lower.y, lower.z, lower.w, upper.x, upper.y, upper.z, upper.w};
  const __half* params =
      static_cast<const __half*>(p.quantized.scale) + (entry / p.group * 2 * parts + part) * p.group + entry % p.group;
  float scale[8], low[8];
  kv::unpack<__half>(scale, *reinterpret_cast<const uint4*>(params));
  kv::unpack<__half>(low, *reinterpret_cast<const uint4*>(params + parts * p.group));
#pragma unroll
  for (int t = 0; t < 8; ++t) {
    if (place.token + t < place.start) continue;
    if (place.token + t >= place.stop) return;
    uint32_t codes[kOctet];
    float scales[kOctet], lows[kOctet];
#pragma unroll
    for (int c = 0; c < kOctet; ++c) codes[c] = words[c] >> (4 * t) & 15, scales[c] = scale[t], lows[c] = low[t];
    place.template store<T>(p, place.token + t, expand_octet<T>(codes, scales, lows));
  }
}

template <typename T>
cudaError_t launch_dequantize(const KvExpandArgs& args, cudaStream_t stream) {
  if (args.values) return kv::launch_expand(kv_int4_values_kernel<T>, args, 8, stream);
  return kv::launch_expand(kv_int4_keys_kernel<T>, args, 1, stream);
}

}  // namespace

cudaError_t launch_kv_int4_append(const KvNewTokens& tokens, const KvGroupedStorage& storage, Dtype dtype,
                                  cudaStream_t stream) {
  return kv::launch_append_groups<Int4>(tokens, storage, dtype, stream);
}

cudaError_t launch_kv_int4_dequantize(const KvExpandArgs& args, Dtype dtype, cudaStream_t stream) {
  if (dtype == Dtype::kFloat16) return launch_dequantize<__half>(args, stream);
  return launch_dequantize<__nv_bfloat16>(args, stream);
}

}  // namespace hf_fastpath
