// LFM2's short convolution on CUDA: argument checks, dispatch on the dtype, launch (see ops_checks.h).
#include <torch/csrc/stable/library.h>

#include "ops_checks.h"

namespace hf_fastpath {
namespace {

// What both ops take, of one token a row or of many; `mask` without a token dimension for one.
struct ShortConv {
  Check check;
  const Tensor& bcx;
  const Tensor& state;
  const Tensor& weight;
  const std::optional<Tensor>& bias;
  const std::optional<Tensor>& mask;

  bool step() const { return bcx.dim() == 2; }
  int64_t batch() const { return bcx.size(0); }
  int64_t tokens() const { return step() ? 1 : bcx.size(1); }
  int64_t channels() const { return weight.size(0); }
  int64_t taps() const { return weight.size(1); }

  void like_bcx(const Tensor& t, const char* name) const {
    check(t.scalar_type() == bcx.scalar_type(), name, " and bcx must have the same dtype");
    check.contiguous(t, name);
    check.same_device(bcx, t, name);
  }

  Dtype checked() const {
    const ScalarType type = bcx.scalar_type();
    const bool full = type == ScalarType::Float;
    const Dtype dtype = full ? Dtype::kFloat32 : check.float_dtype(bcx, "bcx (float32 is allowed too)");
    check.shape(weight, {-1, -1}, "weight", "(H, L)");
    check(taps() >= kMinConvTaps && taps() <= kMaxConvTaps, "takes ", kMinConvTaps, " to ", kMaxConvTaps, " taps, got ",
          taps());
    check(channels() >= 1 && channels() <= kMaxInt / 8, "weight must have 1 to 2^28 channels, got ", channels());
    check(bcx.size(bcx.dim() - 1) == 3 * channels(), "bcx must hold 3 H = ", 3 * channels(), " values a token, got ",
          bcx);
    check(bcx.stride(bcx.dim() - 1) == 1, "bcx must be contiguous in its last dimension");
    check(batch() <= 65535, "takes up to 65535 rows, got ", batch());
    check(tokens() >= 1 && tokens() <= kMaxInt / 2, "takes 1 to 2^30 tokens, got ", tokens());
    check.shape(state, {batch(), channels(), taps()}, "state", "(batch, H, L)");
    like_bcx(state, "state");
    like_bcx(weight, "weight");
    if (bias) {
      check.shape(*bias, {channels()}, "bias", "(H,)");
      like_bcx(*bias, "bias");
    }
    if (mask) {
      check.dtype(*mask, ScalarType::Bool, "mask", "bool");
      if (step()) {
        check.shape(*mask, {batch()}, "mask", "(batch,)");
      } else {
        check.shape(*mask, {batch(), tokens()}, "mask", "(batch, T)");
      }
      check.same_device(bcx, *mask, "mask");
    }
    return dtype;
  }

  Tensor run() const {
    const Dtype dtype = checked();
    const Launch launch(bcx);
    Tensor out = step() ? launch.empty({batch(), channels()}, bcx.scalar_type())
                        : launch.empty({batch(), tokens(), channels()}, bcx.scalar_type());
    if (batch() == 0) return out;
    const ShortConvArgs args{data(bcx),
                             bcx.stride(0),
                             step() ? 0 : bcx.stride(1),
                             state.data_ptr(),
                             data(weight),
                             data(bias),
                             data<uint8_t>(mask),
                             mask ? mask->stride(0) : 0,
                             mask && !step() ? mask->stride(1) : 0,
                             out.data_ptr(),
                             static_cast<int>(batch()),
                             static_cast<int>(tokens()),
                             static_cast<int>(channels()),
                             static_cast<int>(taps())};
    check.launched(launch_short_conv(args, dtype, launch.sm_count(), launch.stream()));
    return out;
  }
};

Tensor short_conv_prefill(const Tensor& bcx, const Tensor& state, const Tensor& weight,
                          const std::optional<Tensor>& bias, const std::optional<Tensor>& mask) {
  const ShortConv conv{{"short_conv_prefill"}, bcx, state, weight, bias, mask};
  conv.check.shape(bcx, {-1, -1, -1}, "bcx", "(batch, T, 3 H)");
  return conv.run();
}

Tensor short_conv_step(const Tensor& bcx, const Tensor& state, const Tensor& weight, const std::optional<Tensor>& bias,
                       const std::optional<Tensor>& mask) {
  const ShortConv conv{{"short_conv_step"}, bcx, state, weight, bias, mask};
  conv.check.shape(bcx, {-1, -1}, "bcx", "(batch, 3 H)");
  return conv.run();
}

}  // namespace
}  // namespace hf_fastpath

STABLE_TORCH_LIBRARY_IMPL(hf_fastpath, CUDA, m) {
  m.impl("short_conv_prefill", TORCH_BOX(&hf_fastpath::short_conv_prefill));
  m.impl("short_conv_step", TORCH_BOX(&hf_fastpath::short_conv_step));
}
