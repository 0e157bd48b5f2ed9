// y = silu(gate) * up with gate and up the halves of RMSNorm(x) @ W.T + bias, for 1..16 rows of x and W packed int4;
// see common/decode_linear.cuh.
#include "common/int4_linear.cuh"

namespace hf_fastpath {
namespace {

template <typename T>
cudaError_t launch(const W4A16LinearArgs& args, int sm_count, cudaStream_t stream) {
  return linear::for_int4_format<T>(args.group_size, args.zeros, [&](auto format) {
    constexpr auto kSwiGlu = linear::Epilogue::kSwiGlu;
    return linear::launch_int4<decltype(format), kSwiGlu>(linear::int4_params<T>(args), sm_count, stream);
  });
}

}  // namespace

cudaError_t launch_w4a16_swiglu(const W4A16LinearArgs& args, Dtype dtype, int sm_count, cudaStream_t stream) {
  if (args.residual || args.n % 32) return cudaErrorInvalidValue;
  return linear::launch_behind_norm(args, w4a16_norm_is_apart(args), dtype, stream,
                                    [&](const W4A16LinearArgs& product) {
                                      if (dtype == Dtype::kFloat16) return launch<__half>(product, sm_count, stream);
                                      return launch<__nv_bfloat16>(product, sm_count, stream);
                                    });
}

}  // namespace hf_fastpath
