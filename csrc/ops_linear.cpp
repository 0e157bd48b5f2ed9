// The products on CUDA: argument checks, dispatch on the dtype, launch (see ops_checks.h).
#include <torch/csrc/stable/library.h>

#include "ops_checks.h"

namespace hf_fastpath {
namespace {

// The packed weight's tensors, as described in hf_fastpath/packing.py. Returns the scales' dtype.
Dtype check_packed(const Check& check, const Tensor& qweight, const Tensor& scales, const std::optional<Tensor>& zeros,
                   int64_t k, int64_t n, int64_t group_size) {
  check(group_size == 32 || group_size == 64 || group_size == 128, "group_size must be 32, 64 or 128, got ",
        group_size);
  check(n >= 1 && n <= kMaxInt - 16, "out_features must be positive, got ", n);
  check(k >= group_size && k <= kMaxInt - 128 && k % group_size == 0,
        "in_features must be a positive multiple of group_size ", group_size, ", got ", k);
  const int64_t row_tiles = (n + 15) / 16;
  check.dtype(qweight, ScalarType::Int, "qweight", "int32");
  check.shape(qweight, {row_tiles, (k + 63) / 64, 32, 4}, "qweight", "(ceil(N/16), ceil(K/64), 32, 4)");
  check.contiguous(qweight, "qweight");
  check.aligned(qweight, 16, "qweight");
  const Dtype dtype = check.float_dtype(scales, "scales");
  check.shape(scales, {row_tiles, k / group_size, 16}, "scales", "(ceil(N/16), K/group, 16)");
  check.contiguous(scales, "scales");
  check.aligned(scales, 4, "scales");
  check.same_device(qweight, scales, "scales");
  if (zeros) {
    check.dtype(*zeros, ScalarType::Byte, "zeros", "uint8");
    check.shape(*zeros, {row_tiles, k / group_size, 16}, "zeros", "(ceil(N/16), K/group, 16)");
    check.contiguous(*zeros, "zeros");
    check.aligned(*zeros, 4, "zeros");
    check.same_device(qweight, *zeros, "zeros");
  }
  return dtype;
}

// x, a matrix, and bias of a product whose packed weight was checked before.
void check_product(const Check& check, const Tensor& x, const Tensor& qweight, const Tensor& scales,
                   const std::optional<Tensor>& bias, int64_t out_features) {
  check(x.stride(1) == 1, "x must be contiguous in its last dimension");
  check(x.scalar_type() == scales.scalar_type(), "x and scales must have the same dtype");
  check.same_device(x, qweight, "qweight");
  if (bias) {
    check(bias->scalar_type() == x.scalar_type(), "bias and x must have the same dtype");
    check.shape(*bias, {out_features}, "bias", "(N,)");
    check.contiguous(*bias, "bias");
    check.same_device(x, *bias, "bias");
  }
}

// The same for the kernels that take a few rows only.
void check_rows(const Check& check, const Tensor& x, const Tensor& qweight, const Tensor& scales,
                const std::optional<Tensor>& bias, int64_t out_features, const char* many_rows) {
  check(x.size(0) <= kMaxLinearRows, "takes up to ", kMaxLinearRows, " rows, got ", x.size(0), "; use ", many_rows,
        " for more");
  check_product(check, x, qweight, scales, bias, out_features);
}

// What only the fused products ask for: aligned rows, and the norm's weight.
void check_fused(const Check& check, const Tensor& x, const std::optional<Tensor>& norm_weight, double eps) {
  check.aligned(x, 16, "x");
  check(x.size(0) <= 1 || x.stride(0) % 8 == 0, "the row stride of x must be a multiple of 8, got ", x.stride(0));
  if (!norm_weight) return;
  check(norm_weight->scalar_type() == x.scalar_type(), "norm_weight and x must have the same dtype");
  check.shape(*norm_weight, {x.size(1)}, "norm_weight", "(K,)");
  check.contiguous(*norm_weight, "norm_weight");
  check.aligned(*norm_weight, 16, "norm_weight");
  check.same_device(x, *norm_weight, "norm_weight");
  check(eps >= 0, "eps must not be negative, got ", eps);
}

W4A16LinearArgs int4_args(const Tensor& x, const Tensor& qweight, const Tensor& scales,
                          const std::optional<Tensor>& zeros, const std::optional<Tensor>& bias, const Tensor& y,
                          int64_t out_features, int64_t group_size) {
  W4A16LinearArgs args = {};
  args.x = data(x);
  args.x_row_stride = x.stride(0);
  args.qweight = data(qweight);
  args.scales = data(scales);
  args.zeros = data<uint8_t>(zeros);
  args.bias = data(bias);
  args.y = y.data_ptr();
  args.m = static_cast<int>(x.size(0));
  args.n = static_cast<int>(out_features);
  args.k = static_cast<int>(x.size(1));
  args.group_size = static_cast<int>(group_size);
  return args;
}

// Where x's RMSNorm goes, if a kernel of its own computes it; else empty.
Tensor normalized_scratch(const Launch& launch, const Tensor& x, const W4A16LinearArgs& args) {
  return launch.empty({w4a16_norm_is_apart(args) ? x.size(0) : 0, x.size(1)}, x.scalar_type());
}

Tensor w4a16_linear(const Tensor& x, const Tensor& qweight, const Tensor& scales, const std::optional<Tensor>& zeros,
                    const std::optional<Tensor>& bias, int64_t out_features, int64_t group_size) {
  constexpr Check check{"w4a16_linear"};
  check.shape(x, {-1, -1}, "x", "(M, K)");
  const Dtype dtype = check_packed(check, qweight, scales, zeros, x.size(1), out_features, group_size);
  check_rows(check, x, qweight, scales, bias, out_features, "w4a16_dequantize");
  const Launch launch(x);
  Tensor y = launch.empty({x.size(0), out_features}, x.scalar_type());
  if (x.size(0) == 0) return y;
  const W4A16LinearArgs args = int4_args(x, qweight, scales, zeros, bias, y, out_features, group_size);
  check.launched(launch_w4a16_linear(args, dtype, launch.sm_count(), launch.stream()));
  return y;
}

void check_residual(const Check& check, const Tensor& x, const std::optional<Tensor>& residual, int64_t out_features) {
  if (!residual) return;
  check(residual->scalar_type() == x.scalar_type(), "residual and x must have the same dtype");
  check.shape(*residual, {x.size(0), out_features}, "residual", "(M, N)");
  check.contiguous(*residual, "residual");
  check.same_device(x, *residual, "residual");
}

Tensor w4a16_linear_fused(const Tensor& x, const Tensor& qweight, const Tensor& scales,
                          const std::optional<Tensor>& zeros, const std::optional<Tensor>& bias,
                          const std::optional<Tensor>& norm_weight, double eps, const std::optional<Tensor>& residual,
                          int64_t out_features, int64_t group_size) {
  constexpr Check check{"w4a16_linear_fused"};
  check.shape(x, {-1, -1}, "x", "(M, K)");
  const Dtype dtype = check_packed(check, qweight, scales, zeros, x.size(1), out_features, group_size);
  check_rows(check, x, qweight, scales, bias, out_features, "separate modules");
  check_fused(check, x, norm_weight, eps);
  check_residual(check, x, residual, out_features);
  const Launch launch(x);
  Tensor y = launch.empty({x.size(0), out_features}, x.scalar_type());
  if (x.size(0) == 0) return y;
  W4A16LinearArgs args = int4_args(x, qweight, scales, zeros, bias, y, out_features, group_size);
  args.norm_weight = data(norm_weight);
  args.eps = static_cast<float>(eps);
  args.residual = data(residual);
  const Tensor normalized = normalized_scratch(launch, x, args);
  args.normalized = normalized.data_ptr();
  check.launched(launch_w4a16_linear_fused(args, dtype, launch.sm_count(), launch.stream()));
  return y;
}

Tensor w4a16_swiglu(const Tensor& x, const Tensor& qweight, const Tensor& scales, const std::optional<Tensor>& zeros,
                    const std::optional<Tensor>& bias, const std::optional<Tensor>& norm_weight, double eps,
                    int64_t intermediate_size, int64_t group_size) {
  constexpr Check check{"w4a16_swiglu"};
  check(intermediate_size >= 16 && intermediate_size <= kMaxInt / 2 - 16 && intermediate_size % 16 == 0,
        "intermediate_size must be a positive multiple of 16, got ", intermediate_size);
  check.shape(x, {-1, -1}, "x", "(M, K)");
  const int64_t rows = 2 * intermediate_size;
  const Dtype dtype = check_packed(check, qweight, scales, zeros, x.size(1), rows, group_size);
  check_rows(check, x, qweight, scales, bias, rows, "separate modules");
  check_fused(check, x, norm_weight, eps);
  const Launch launch(x);
  Tensor y = launch.empty({x.size(0), intermediate_size}, x.scalar_type());
  if (x.size(0) == 0) return y;
  W4A16LinearArgs args = int4_args(x, qweight, scales, zeros, bias, y, rows, group_size);
  args.norm_weight = data(norm_weight);
  args.eps = static_cast<float>(eps);
  const Tensor normalized = normalized_scratch(launch, x, args);
  args.normalized = normalized.data_ptr();
  check.launched(launch_w4a16_swiglu(args, dtype, launch.sm_count(), launch.stream()));
  return y;
}

Tensor w4a16_short_conv(const Tensor& x, const Tensor& qweight, const Tensor& scales,
                        const std::optional<Tensor>& zeros, const std::optional<Tensor>& bias,
                        const Tensor& norm_weight, double eps, const Tensor& state, const Tensor& conv_weight,
                        const std::optional<Tensor>& conv_bias, const std::optional<Tensor>& mask, int64_t group_size) {
  constexpr Check check{"w4a16_short_conv"};
  check.shape(x, {-1, -1}, "x", "(M, K)");
  check.shape(conv_weight, {-1, -1}, "conv_weight", "(H, L)");
  const int64_t channels = conv_weight.size(0), taps = conv_weight.size(1), rows = 3 * channels;
  check(channels >= 16 && channels <= kMaxInt / 8 && channels % 16 == 0,
        "conv_weight must have a multiple of 16 channels, up to 2^28, got ", channels);
  check(taps >= kMinConvTaps && taps <= kMaxConvTaps, "takes ", kMinConvTaps, " to ", kMaxConvTaps, " taps, got ",
        taps);
  const Dtype dtype = check_packed(check, qweight, scales, zeros, x.size(1), rows, group_size);
  check_rows(check, x, qweight, scales, bias, rows, "separate modules");
  check_fused(check, x, norm_weight, eps);
  check.shape(state, {x.size(0), channels, taps}, "state", "(M, H, L)");
  if (conv_bias) check.shape(*conv_bias, {channels}, "conv_bias", "(H,)");
  for (const Tensor* each : {&state, &conv_weight, conv_bias ? &*conv_bias : nullptr}) {
    if (!each) continue;
    check(each->scalar_type() == x.scalar_type(), "state, conv_weight, conv_bias and x must have the same dtype");
    check.contiguous(*each, "each of state, conv_weight and conv_bias");
    check.same_device(x, *each, "each of state, conv_weight and conv_bias");
  }
  if (mask) {
    check.dtype(*mask, ScalarType::Bool, "mask", "bool");
    check.shape(*mask, {x.size(0)}, "mask", "(M,)");
    check.same_device(x, *mask, "mask");
  }
  const Launch launch(x);
  Tensor y = launch.empty({x.size(0), channels}, x.scalar_type());
  if (x.size(0) == 0) return y;
  W4A16LinearArgs args = int4_args(x, qweight, scales, zeros, bias, y, rows, group_size);
  args.norm_weight = data(norm_weight);
  args.eps = static_cast<float>(eps);
  const Tensor normalized = normalized_scratch(launch, x, args);
  args.normalized = normalized.data_ptr();
  ShortConvArgs conv = {};
  conv.state = state.data_ptr();
  conv.weight = data(conv_weight);
  conv.bias = data(conv_bias);
  conv.mask = data<uint8_t>(mask);
  conv.mask_stride_batch = mask ? mask->stride(0) : 0;
  conv.channels = static_cast<int>(channels);
  conv.taps = static_cast<int>(taps);
  check.launched(launch_w4a16_short_conv(args, conv, dtype, launch.sm_count(), launch.stream()));
  return y;
}

// The packed weight's tensors, as described in hf_fastpath/packing_int8.py. Returns the scales' dtype.
Dtype check_packed_int8(const Check& check, const Tensor& qweight, const Tensor& scales, int64_t k, int64_t n) {
  check(n >= 1 && n <= kMaxInt - 16, "out_features must be positive, got ", n);
  check(k >= 32 && k <= kMaxInt - 128 && k % 32 == 0, "in_features must be a positive multiple of 32, got ", k);
  check.dtype(qweight, ScalarType::Char, "qweight", "int8");
  check.shape(qweight, {(n + 15) / 16, k / 32, 32, 16}, "qweight", "(ceil(N/16), K/32, 32, 16)");
  check.contiguous(qweight, "qweight");
  check.aligned(qweight, 16, "qweight");
  const Dtype dtype = check.float_dtype(scales, "scales");
  check.shape(scales, {n}, "scales", "(N,)");
  check.contiguous(scales, "scales");
  check.same_device(qweight, scales, "scales");
  return dtype;
}

Tensor w8a16_linear(const Tensor& x, const Tensor& qweight, const Tensor& scales, const std::optional<Tensor>& bias,
                    int64_t out_features) {
  constexpr Check check{"w8a16_linear"};
  check.shape(x, {-1, -1}, "x", "(M, K)");
  const Dtype dtype = check_packed_int8(check, qweight, scales, x.size(1), out_features);
  check_rows(check, x, qweight, scales, bias, out_features, "w8a16_dequantize");
  const Launch launch(x);
  Tensor y = launch.empty({x.size(0), out_features}, x.scalar_type());
  if (x.size(0) == 0) return y;
  const W8A16LinearArgs args{data(x),
                             x.stride(0),
                             data(qweight),
                             data(scales),
                             data(bias),
                             y.data_ptr(),
                             static_cast<int>(x.size(0)),
                             static_cast<int>(out_features),
                             static_cast<int>(x.size(1))};
  check.launched(launch_w8a16_linear(args, dtype, launch.sm_count(), launch.stream()));
  return y;
}

Tensor w8a16_dequantize(const Tensor& qweight, const Tensor& scales, int64_t out_features) {
  constexpr Check check{"w8a16_dequantize"};
  check.shape(qweight, {-1, -1, -1, -1}, "qweight", "(ceil(N/16), K/32, 32, 16)");
  const int64_t in_features = qweight.size(1) * 32;
  const Dtype dtype = check_packed_int8(check, qweight, scales, in_features, out_features);
  const Launch launch(qweight);
  Tensor out = launch.empty({out_features, in_features}, scales.scalar_type());
  const W8A16DequantizeArgs args{data(qweight), data(scales), out.data_ptr(), static_cast<int>(out_features),
                                 static_cast<int>(in_features)};
  check.launched(launch_w8a16_dequantize(args, dtype, launch.stream()));
  return out;
}

// Checks what w4a16_gemm and w4a16_gemm_swiglu have in common, their x being a matrix, and returns the scales' dtype.
Dtype check_gemm(const Check& check, const Tensor& x, const Tensor& qweight, const Tensor& scales,
                 const std::optional<Tensor>& zeros, const std::optional<Tensor>& bias, int64_t out_features,
                 int64_t group_size, int64_t variant) {
  check(variant >= 0 && variant < kW4A16GemmVariants, "variant must be in 0 to ", kW4A16GemmVariants - 1, ", got ",
        variant);
  check.shape(x, {-1, -1}, "x", "(M, K)");
  const int64_t m = x.size(0), k = x.size(1);
  const Dtype dtype = check_packed(check, qweight, scales, zeros, k, out_features, group_size);
  check.aligned(scales, 16, "scales");
  if (zeros) check.aligned(*zeros, 16, "zeros");
  check_product(check, x, qweight, scales, bias, out_features);
  // The smallest tile is 128 by 32, and its units of 128 columns are counted in 32 bits.
  check(k <= 1 << 24, "in_features must be at most ", 1 << 24, ", got ", k);
  check(m <= kMaxInt - 256 && (out_features / 128 + 1) * (m / 32 + 1) <= kMaxInt / (k / 128 + 1),
        "M * N * K is too large: ", m, " * ", out_features, " * ", k);
  return dtype;
}

W4A16GemmArgs gemm_args(const Tensor& x, const Tensor& qweight, const Tensor& scales,
                        const std::optional<Tensor>& zeros, const std::optional<Tensor>& bias, const Tensor& y,
                        int64_t out_features, int64_t group_size, int64_t variant) {
  W4A16GemmArgs args = {};
  args.x = data(x);
  args.x_row_stride = x.stride(0);
  args.qweight = data(qweight);
  args.scales = data(scales);
  args.zeros = data<uint8_t>(zeros);
  args.bias = data(bias);
  args.y = y.data_ptr();
  args.m = static_cast<int>(x.size(0));
  args.n = static_cast<int>(out_features);
  args.k = static_cast<int>(x.size(1));
  args.group_size = static_cast<int>(group_size);
  args.variant = static_cast<int>(variant);
  return args;
}

void check_gemm_launched(const Check& check, int64_t variant, cudaError_t error) {
  check(error != cudaErrorNoKernelImageForDevice, "variant ", variant,
        " needs a GPU of compute capability 9.0, and kernels that were compiled for sm_90a");
  check.launched(error);
}

Tensor w4a16_gemm(const Tensor& x, const Tensor& qweight, const Tensor& scales, const std::optional<Tensor>& zeros,
                  const std::optional<Tensor>& bias, int64_t out_features, int64_t group_size, int64_t variant,
                  const std::optional<Tensor>& residual) {
  constexpr Check check{"w4a16_gemm"};
  const Dtype dtype = check_gemm(check, x, qweight, scales, zeros, bias, out_features, group_size, variant);
  check_residual(check, x, residual, out_features);
  const Launch launch(x);
  Tensor y = launch.empty({x.size(0), out_features}, x.scalar_type());
  if (x.size(0) == 0) return y;
  W4A16GemmArgs args = gemm_args(x, qweight, scales, zeros, bias, y, out_features, group_size, variant);
  const int64_t floats = w4a16_gemm_workspace_floats(args.m, args.n, args.k, args.variant, launch.sm_count());
  std::optional<Tensor> workspace;
  if (floats) {
    workspace = launch.empty({floats}, ScalarType::Float);
    args.workspace = static_cast<float*>(workspace->data_ptr());
  }
  args.residual = data(residual);
  check_gemm_launched(check, variant, launch_w4a16_gemm(args, dtype, launch.sm_count(), launch.stream()));
  return y;
}

Tensor w4a16_gemm_swiglu(const Tensor& x, const Tensor& qweight, const Tensor& scales,
                         const std::optional<Tensor>& zeros, const std::optional<Tensor>& bias,
                         int64_t intermediate_size, int64_t group_size, int64_t variant) {
  constexpr Check check{"w4a16_gemm_swiglu"};
  check(intermediate_size >= 16 && intermediate_size <= kMaxInt / 2 - 16 && intermediate_size % 16 == 0,
        "intermediate_size must be a positive multiple of 16, got ", intermediate_size);
  const int64_t rows = 2 * intermediate_size;
  const Dtype dtype = check_gemm(check, x, qweight, scales, zeros, bias, rows, group_size, variant);
  check(w4a16_gemm_swiglu_has(static_cast<int>(variant)), "variant ", variant,
        " is none with wgmma and tiles of up to 64 rows of x; use w4a16_gemm and swiglu");
  const Launch launch(x);
  Tensor y = launch.empty({x.size(0), intermediate_size}, x.scalar_type());
  if (x.size(0) == 0) return y;
  const W4A16GemmArgs args = gemm_args(x, qweight, scales, zeros, bias, y, rows, group_size, variant);
  check_gemm_launched(check, variant, launch_w4a16_gemm_swiglu(args, dtype, launch.sm_count(), launch.stream()));
  return y;
}

Tensor w4a16_dequantize(const Tensor& qweight, const Tensor& scales, const std::optional<Tensor>& zeros,
                        int64_t in_features, int64_t out_features, int64_t group_size) {
  constexpr Check check{"w4a16_dequantize"};
  const Dtype dtype = check_packed(check, qweight, scales, zeros, in_features, out_features, group_size);
  const Launch launch(qweight);
  Tensor out = launch.empty({out_features, in_features}, scales.scalar_type());
  const W4A16DequantizeArgs args{data(qweight),
                                 data(scales),
                                 data<uint8_t>(zeros),
                                 out.data_ptr(),
                                 static_cast<int>(out_features),
                                 static_cast<int>(in_features),
                                 static_cast<int>(group_size)};
  check.launched(launch_w4a16_dequantize(args, dtype, launch.stream()));
  return out;
}

}  // namespace
}  // namespace hf_fastpath

STABLE_TORCH_LIBRARY_IMPL(hf_fastpath, CUDA, m) {
  m.impl("w4a16_linear", TORCH_BOX(&hf_fastpath::w4a16_linear));
  m.impl("w4a16_linear_fused", TORCH_BOX(&hf_fastpath::w4a16_linear_fused));
  m.impl("w4a16_swiglu", TORCH_BOX(&hf_fastpath::w4a16_swiglu));
  m.impl("w4a16_short_conv", TORCH_BOX(&hf_fastpath::w4a16_short_conv));
  m.impl("w8a16_linear", TORCH_BOX(&hf_fastpath::w8a16_linear));
  m.impl("w8a16_dequantize", TORCH_BOX(&hf_fastpath::w8a16_dequantize));
  m.impl("w4a16_gemm", TORCH_BOX(&hf_fastpath::w4a16_gemm));
  m.impl("w4a16_gemm_swiglu", TORCH_BOX(&hf_fastpath::w4a16_gemm_swiglu));
  m.impl("w4a16_dequantize", TORCH_BOX(&hf_fastpath::w4a16_dequantize));
}
