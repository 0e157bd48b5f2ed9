// E4M3 keys and values, 64 tokens of a head sharing a scale: quantize into the cache, and back to floats.
// Bit-identical to the references in hf_fastpath/ops/kv_fp8_append.py and kv_fp8_dequantize.py.
#include "common/fp8.cuh"
#include "kv/append_groups.cuh"
#include "kv/expand.cuh"

namespace hf_fastpath {
namespace {

struct Fp8 {
  using Storage = KvGroupedStorage;
  static constexpr int kThreadsPerSm = 1024;
  template <int kLanes>
  struct Shared {
    float largest[kv::kMaxWarps<kLanes>];
  };

  template <typename T, int kLanes>
  static __device__ __forceinline__ void quantize(const Storage& s, Shared<kLanes>& shared, int side,
                                                  const KvNewTokens& p, int64_t pair, int64_t first,
                                                  const kv::LaneRows<kLanes>& rows, int slot, int lane) {
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kv::kTokensPerLane; ++i) {
      float v[kv::kPerLane];
      kv::unpack<T>(v, rows[i]);
#pragma unroll
      for (float value : v) largest = max_nan(largest, fabsf(value));
    }
    largest = warp_max_nan(largest);
    if (threadIdx.x % 32 == 0) shared.largest[threadIdx.x / 32] = largest;
    __syncthreads();
#pragma unroll
    for (float of_warp : shared.largest) largest = max_nan(largest, of_warp);  // a group of 64 tokens has all warps
    const float scale = power_of_two_scale(largest, -126, 127);
    const KvQuantizedSide& target = s.quantized[side];
    if (threadIdx.x == 0) {
      static_cast<float*>(target.scale)[(pair * p.capacity + first) / s.group] = scale;
    }
    if (kv::kPerLane * lane >= p.dim) return;
    const int64_t token = pair * p.capacity + first + kv::kTokensPerLane * slot;
    uint8_t* data = static_cast<uint8_t*>(target.data) + token * p.dim + kv::kPerLane * lane;
#pragma unroll
    for (int i = 0; i < kv::kTokensPerLane; ++i) {
      float v[kv::kPerLane];
      kv::unpack<T>(v, rows[i]);
      *reinterpret_cast<uint2*>(data + i * p.dim) = fp8_bits_8(v, scale, largest);
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(kv::kExpandThreads) kv_fp8_dequantize_kernel(const __grid_constant__ KvExpandArgs p) {
  const kv::ExpandPlace<1> place(p);
  if (place.token >= place.stop) return;
  uint4 bits;
  if (place.token < place.quantized) {
    const int64_t entry = place.pair * p.capacity + place.token;
    const float scale = static_cast<const float*>(p.quantized.scale)[entry / p.group];
    const uint2 bytes = load_once8(static_cast<const uint8_t*>(p.quantized.data) + entry * p.dim + place.channel);
    const uint32_t words[2] = {bytes.x, bytes.y};
    uint32_t out[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 v = fp8_to_floats(words[i / 2] >> (16 * (i % 2)) & 0xffff);
      out[i] = pack_floats(__fmul_rn(v.x, scale), __fmul_rn(v.y, scale), T());
    }
    bits = make_uint4(out[0], out[1], out[2], out[3]);
  } else {
    bits = place.template full_row<T>(p, place.token);
  }
  place.template store<T>(p, place.token, bits);
}

}  // namespace

cudaError_t launch_kv_fp8_append(const KvNewTokens& tokens, const KvGroupedStorage& storage, Dtype dtype,
                                 cudaStream_t stream) {
  return kv::launch_append_groups<Fp8>(tokens, storage, dtype, stream);
}

cudaError_t launch_kv_fp8_dequantize(const KvExpandArgs& args, Dtype dtype, cudaStream_t stream) {
  const auto kernel =
      dtype == Dtype::kFloat16 ? kv_fp8_dequantize_kernel<__half> : kv_fp8_dequantize_kernel<__nv_bfloat16>;
  return kv::launch_expand(kernel, args, 1, stream);
}

}  // namespace hf_fastpath
