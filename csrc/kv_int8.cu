// int8 keys and values with one fp16 scale a token and head: quantize into the cache, and back to floats.
// Bit-identical to the references in hf_fastpath/ops/kv_int8_append.py and kv_int8_dequantize.py, hence the explicit
// IEEE divisions and roundings: they hold whatever the compiler's fast-math flags are.
#include "kv/in_order.cuh"

namespace hf_fastpath {
namespace {

constexpr int kThreads = 128;

// blockIdx.y walks the (batch, head) pairs, threads the length * dim elements of a pair, kPer of one token at a time.
template <typename T, int kPer>
__global__ void __launch_bounds__(kThreads) kv_int8_dequantize_kernel(const KvDequantizeArgs p) {
  wait_for_previous_kernel();
  let_next_kernel_begin();
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int chunks_per_token = p.dim / kPer;
  if (chunk >= p.length * chunks_per_token) return;
  const int64_t token = chunk / chunks_per_token;
  for (int64_t pair = blockIdx.y; pair < p.pairs; pair += gridDim.y) {
    const float scale = __half2float(static_cast<const __half*>(p.scale)[pair * p.capacity + token]);
    const int8_t* source = p.data + pair * p.capacity * p.dim + chunk * kPer;
    T* target = static_cast<T*>(p.out) + pair * p.length * p.dim + chunk * kPer;
    if constexpr (kPer == 1) {
      *target = from_float<T>(__fmul_rn(*source, scale));
    } else {
      const uint2 packed = load_once8(source);
      const uint32_t words[2] = {packed.x, packed.y};
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t word = words[i / 2] >> (16 * (i % 2));
        const float lo = static_cast<int8_t>(word & 0xff), hi = static_cast<int8_t>((word >> 8) & 0xff);
        pairs[i] = pack_floats(__fmul_rn(lo, scale), __fmul_rn(hi, scale), T());
      }
      *reinterpret_cast<uint4*>(target) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
  }
}

template <typename T, int kPer>
cudaError_t launch_dequantize(const KvDequantizeArgs& a, cudaStream_t stream) {
  const int64_t chunks = a.length * (a.dim / kPer);
  const dim3 grid(static_cast<unsigned>((chunks + kThreads - 1) / kThreads),
                  static_cast<unsigned>(std::min<int64_t>(a.pairs, 65535)));
  return launch_kernel_early_if_possible(kv_int8_dequantize_kernel<T, kPer>, grid, kThreads, stream, a);
}

template <typename T>
cudaError_t launch_dequantize_for_alignment(const KvDequantizeArgs& a, cudaStream_t stream) {
  const bool aligned = a.dim % 8 == 0 && aligned_to(a.data, 8) && aligned_to(a.out, 16);
  return aligned ? launch_dequantize<T, 8>(a, stream) : launch_dequantize<T, 1>(a, stream);
}

}  // namespace

cudaError_t launch_kv_int8_append(const KvNewTokens& tokens, const KvInt8Storage& storage, Dtype dtype,
                                  cudaStream_t stream) {
  return kv::launch_append_tokens<kv::Int8>(tokens, storage, dtype, stream);
}

cudaError_t launch_kv_int8_dequantize(const KvDequantizeArgs& args, Dtype dtype, cudaStream_t stream) {
  if (dtype == Dtype::kFloat16) return launch_dequantize_for_alignment<__half>(args, stream);
  return launch_dequantize_for_alignment<__nv_bfloat16>(args, stream);
}

}  // namespace hf_fastpath
