// The step of LFM2's gated short convolution on its first projection, B, C and x being the thirds of RMSNorm(x) @ W.T +
// bias, for 1..16 rows of x and W packed int4; see common/decode_linear.cuh and common/decode_short_conv.cuh.
#include "common/int4_linear.cuh"

namespace hf_fastpath {
namespace {

template <typename T>
cudaError_t launch(const W4A16LinearArgs& args, const ShortConvArgs& conv, int sm_count, cudaStream_t stream) {
  linear::Params<T> p = linear::int4_params<T>(args);
  p.conv = {static_cast<T*>(conv.state),      static_cast<const T*>(conv.weight),
            static_cast<const T*>(conv.bias), conv.mask,
            conv.mask_stride_batch,           conv.taps};
  return linear::for_int4_format<T>(args.group_size, args.zeros, [&](auto format) {
    constexpr auto kShortConv = linear::Epilogue::kShortConv;
    return linear::launch_int4<decltype(format), kShortConv>(p, sm_count, stream);
  });
}

}  // namespace

cudaError_t launch_w4a16_short_conv(const W4A16LinearArgs& args, const ShortConvArgs& conv, Dtype dtype, int sm_count,
                                    cudaStream_t stream) {
  if (args.residual || args.n != 3 * conv.channels || conv.channels % 16) return cudaErrorInvalidValue;
  if (conv.taps < kMinConvTaps || conv.taps > kMaxConvTaps) return cudaErrorInvalidValue;
  return linear::launch_behind_norm(args, w4a16_norm_is_apart(args), dtype, stream,
                                    [&](const W4A16LinearArgs& product) {
                                      if (dtype == Dtype::kFloat16)
                                        return launch<__half>(product, conv, sm_count, stream);
                                      return launch<__nv_bfloat16>(product, conv, sm_count, stream);
                                    });
}

}  // namespace hf_fastpath
