// The products of plain 16-bit weights, and RMSNorm, on CUDA: argument checks, dispatch on the dtype, launch (see
// ops_checks.h).
#include <torch/csrc/stable/library.h>

#include "ops_checks.h"

namespace hf_fastpath {
namespace {

void check_norm(const Check& check, const Tensor& x, const Tensor& weight, double eps, const char* name) {
  check(weight.scalar_type() == x.scalar_type(), name, " and x must have the same dtype");
  check.shape(weight, {x.size(1)}, name, "(K,)");
  check.contiguous(weight, name);
  check.aligned(weight, 16, name);
  check.same_device(x, weight, name);
  check(eps >= 0, "eps must not be negative, got ", eps);
}

void check_rows(const Check& check, const Tensor& x) {
  check(x.stride(1) == 1, "x must be contiguous in its last dimension");
  check.aligned(x, 16, "x");
  check(x.size(0) <= 1 || x.stride(0) % 8 == 0, "the row stride of x must be a multiple of 8, got ", x.stride(0));
}

// Everything but the residual. Returns the dtype.
Dtype check_product(const Check& check, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                    const std::optional<Tensor>& norm_weight, double eps) {
  check.shape(x, {-1, -1}, "x", "(M, K)");
  check(x.size(0) <= kMaxLinearRows, "takes up to ", kMaxLinearRows, " rows, got ", x.size(0),
        "; use torch.nn.functional.linear for more");
  const Dtype dtype = check.float_dtype(x, "x");
  const int64_t k = x.size(1);
  check(k >= 32 && k <= kMaxInt - 128 && k % 32 == 0, "in_features must be a positive multiple of 32, got ", k);
  check_rows(check, x);
  check.shape(weight, {-1, k}, "weight", "(N, K)");
  const int64_t n = weight.size(0);
  check(n >= 1 && n <= kMaxInt - 16, "out_features must be positive, got ", n);
  check(weight.scalar_type() == x.scalar_type(), "weight and x must have the same dtype");
  check.contiguous(weight, "weight");
  check.aligned(weight, 16, "weight");
  check.same_device(x, weight, "weight");
  if (bias) {
    check(bias->scalar_type() == x.scalar_type(), "bias and x must have the same dtype");
    check.shape(*bias, {n}, "bias", "(N,)");
    check.contiguous(*bias, "bias");
    check.same_device(x, *bias, "bias");
  }
  if (norm_weight) check_norm(check, x, *norm_weight, eps, "norm_weight");
  return dtype;
}

Linear16BitArgs args_of(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& norm_weight, double eps, const Tensor& y) {
  Linear16BitArgs args = {};
  args.x = data(x);
  args.x_row_stride = x.stride(0);
  args.weight = data(weight);
  args.bias = data(bias);
  args.y = y.data_ptr();
  args.m = static_cast<int>(x.size(0));
  args.n = static_cast<int>(weight.size(0));
  args.k = static_cast<int>(x.size(1));
  args.norm_weight = data(norm_weight);
  args.eps = static_cast<float>(eps);
  return args;
}

// Where x's RMSNorm goes, if a kernel of its own computes it; else empty.
Tensor normalized_scratch(const Launch& launch, const Tensor& x, const Linear16BitArgs& args) {
  return launch.empty({linear_16bit_norm_is_apart(args) ? x.size(0) : 0, x.size(1)}, x.scalar_type());
}

// Into y, which is (M, N) and contiguous.
void multiply(const Check& check, const Launch& launch, const Tensor& x, const Tensor& weight,
              const std::optional<Tensor>& bias, const std::optional<Tensor>& norm_weight, double eps,
              const void* residual, Dtype dtype, bool float32_out, const Tensor& y) {
  Linear16BitArgs args = args_of(x, weight, bias, norm_weight, eps, y);
  args.residual = residual;
  args.float32_out = float32_out;
  const Tensor normalized = normalized_scratch(launch, x, args);
  args.normalized = normalized.data_ptr();
  check.launched(launch_linear_16bit(args, dtype, launch.sm_count(), launch.stream()));
}

Tensor linear_16bit(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                    const std::optional<Tensor>& norm_weight, double eps, const std::optional<Tensor>& residual,
                    bool float32_out) {
  constexpr Check check{"linear_16bit"};
  const Dtype dtype = check_product(check, x, weight, bias, norm_weight, eps);
  if (residual) {
    check(residual->scalar_type() == x.scalar_type(), "residual and x must have the same dtype");
    check.shape(*residual, {x.size(0), weight.size(0)}, "residual", "(M, N)");
    check.contiguous(*residual, "residual");
    check.same_device(x, *residual, "residual");
  }
  const Launch launch(x);
  Tensor y = launch.empty({x.size(0), weight.size(0)}, float32_out ? ScalarType::Float : x.scalar_type());
  if (x.size(0) == 0) return y;
  multiply(check, launch, x, weight, bias, norm_weight, eps, data(residual), dtype, float32_out, y);
  return y;
}

void linear_16bit_into(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& out) {
  constexpr Check check{"linear_16bit_into"};
  const Dtype dtype = check_product(check, x, weight, bias, std::nullopt, 0.0);
  check(out.scalar_type() == x.scalar_type(), "out and x must have the same dtype");
  check.shape(out, {x.size(0), weight.size(0)}, "out", "(M, N)");
  check.contiguous(out, "out");
  check.same_device(x, out, "out");
  if (x.size(0) == 0) return;
  multiply(check, Launch(x), x, weight, bias, std::nullopt, 0.0, nullptr, dtype, false, out);
}

Tensor linear_16bit_swiglu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                           const std::optional<Tensor>& norm_weight, double eps) {
  constexpr Check check{"linear_16bit_swiglu"};
  const Dtype dtype = check_product(check, x, weight, bias, norm_weight, eps);
  const int64_t rows = weight.size(0);
  check(rows % 32 == 0, "weight must have the rows of gate and of up, each a multiple of 16, got ", rows, " in all");
  const Launch launch(x);
  Tensor y = launch.empty({x.size(0), rows / 2}, x.scalar_type());
  if (x.size(0) == 0) return y;
  Linear16BitArgs args = args_of(x, weight, bias, norm_weight, eps, y);
  const Tensor normalized = normalized_scratch(launch, x, args);
  args.normalized = normalized.data_ptr();
  check.launched(launch_linear_16bit_swiglu(args, dtype, launch.sm_count(), launch.stream()));
  return y;
}

}  // namespace
}  // namespace hf_fastpath

STABLE_TORCH_LIBRARY_IMPL(hf_fastpath, CUDA, m) {
  m.impl("linear_16bit", TORCH_BOX(&hf_fastpath::linear_16bit));
  m.impl("linear_16bit_into", TORCH_BOX(&hf_fastpath::linear_16bit_into));
  m.impl("linear_16bit_swiglu", TORCH_BOX(&hf_fastpath::linear_16bit_swiglu));
}
