// y = silu(gate) * up with gate and up the halves of RMSNorm(x) @ W.T + bias, for 1..16 rows of x and a plain 16-bit W;
// see common/decode_linear.cuh.
#include "common/weights_16bit.cuh"

namespace hf_fastpath {

cudaError_t launch_linear_16bit_swiglu(const Linear16BitArgs& args, Dtype dtype, int sm_count, cudaStream_t stream) {
  if (args.residual || args.float32_out || args.n % 32) return cudaErrorInvalidValue;
  constexpr auto kSwiGlu = linear::Epilogue::kSwiGlu;
  const bool apart = linear_16bit_norm_is_apart(args);
  return linear::launch_behind_norm(args, apart, dtype, stream, [&](const Linear16BitArgs& product) {
    if (dtype == Dtype::kFloat16) return linear::launch_16bit<__half, kSwiGlu>(product, sm_count, stream);
    return linear::launch_16bit<__nv_bfloat16, kSwiGlu>(product, sm_count, stream);
  });
}

}  // namespace hf_fastpath
