// y = residual + RMSNorm(x) @ W.T + bias for 1..16 rows of x and a plain 16-bit W; see common/decode_linear.cuh.
#include "common/weights_16bit.cuh"

namespace hf_fastpath {

bool linear_16bit_norm_is_apart(const Linear16BitArgs& args) {
  const auto p = linear::params_of<__half>(args);
  return args.norm_weight && !linear::normalizes_itself<linear::Weights16Bit<__half>>(p);
}

cudaError_t launch_linear_16bit(const Linear16BitArgs& args, Dtype dtype, int sm_count, cudaStream_t stream) {
  constexpr auto kResidual = linear::Epilogue::kResidual;
  const bool apart = linear_16bit_norm_is_apart(args);
  return linear::launch_behind_norm(args, apart, dtype, stream, [&](const Linear16BitArgs& product) {
    if (dtype == Dtype::kFloat16) return linear::launch_16bit<__half, kResidual>(product, sm_count, stream);
    return linear::launch_16bit<__nv_bfloat16, kResidual>(product, sm_count, stream);
  });
}

}  // namespace hf_fastpath
