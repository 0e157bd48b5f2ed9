// What is between the products of a decoder layer and before them, on CUDA: argument checks, dispatch on the dtype,
// launch.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops_checks.h"

namespace hf_fastpath {
namespace {

// x (M, K), its norm's weight, and y, which is to be (M, K).
RmsNormArgs norm_args(const Check& check, const Tensor& x, const Tensor& weight, double eps) {
  check.shape(x, {-1, -1}, "x", "(M, K)");
  check(x.size(1) >= 8 && x.size(1) % 8 == 0 && x.size(1) <= kMaxInt - 8192,
        "the columns of x must be a positive multiple of 8, got ", x.size(1));
  check(x.size(0) <= kMaxInt, "takes up to ", kMaxInt, " rows, got ", x.size(0));
  check(x.stride(1) == 1, "x must be contiguous in its last dimension");
  check.aligned(x, 16, "x");
  check(x.size(0) <= 1 || x.stride(0) % 8 == 0, "the row stride of x must be a multiple of 8, got ", x.stride(0));
  check(weight.scalar_type() == x.scalar_type(), "weight and x must have the same dtype");
  check.shape(weight, {x.size(1)}, "weight", "(K,)");
  check.contiguous(weight, "weight");
  check.aligned(weight, 16, "weight");
  check.same_device(x, weight, "weight");
  check(eps >= 0, "eps must not be negative, got ", eps);
  RmsNormArgs args = {};
  args.x = data(x);
  args.x_row_stride = x.stride(0);
  args.weight = data(weight);
  args.eps = static_cast<float>(eps);
  args.m = static_cast<int>(x.size(0));
  args.k = static_cast<int>(x.size(1));
  return args;
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  constexpr Check check{"rms_norm"};
  const Dtype dtype = check.float_dtype(x, "x");
  RmsNormArgs args = norm_args(check, x, weight, eps);
  const Launch launch(x);
  Tensor y = launch.empty({x.size(0), x.size(1)}, x.scalar_type());
  if (x.size(0) == 0) return y;
  args.y = y.data_ptr();
  check.launched(launch_rms_norm(args, dtype, launch.stream()));
  return y;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  constexpr Check check{"add_rms_norm"};
  const Dtype dtype = check.float_dtype(x, "x");
  RmsNormArgs args = norm_args(check, x, weight, eps);
  check(residual.scalar_type() == x.scalar_type(), "residual and x must have the same dtype");
  check.shape(residual, {x.size(0), x.size(1)}, "residual", "(M, K)");
  check.contiguous(residual, "residual");
  check.aligned(residual, 16, "residual");
  check.same_device(x, residual, "residual");
  const Launch launch(x);
  Tensor sums = launch.empty({x.size(0), x.size(1)}, x.scalar_type());
  Tensor y = launch.empty({x.size(0), x.size(1)}, x.scalar_type());
  if (x.size(0) == 0) return {sums, y};
  args.y = y.data_ptr();
  check.launched(launch_add_rms_norm(args, data(residual), sums.data_ptr(), dtype, launch.stream()));
  return {sums, y};
}

Tensor swiglu(const Tensor& x) {
  constexpr Check check{"swiglu"};
  const Dtype dtype = check.float_dtype(x, "x");
  check.shape(x, {-1, -1}, "x", "(M, 2 I)");
  const int64_t rows = x.size(0), columns = x.size(1) / 2;
  check(columns >= 8 && x.size(1) % 16 == 0 && x.size(1) <= kMaxInt - 8192,
        "the columns of x must be a positive multiple of 16, got ", x.size(1));
  check(rows <= kMaxInt, "takes up to ", kMaxInt, " rows, got ", rows);
  check.contiguous(x, "x");
  check.aligned(x, 16, "x");
  const Launch launch(x);
  Tensor y = launch.empty({rows, columns}, x.scalar_type());
  if (rows == 0) return y;
  check.launched(
      launch_swiglu(data(x), y.data_ptr(), static_cast<int>(rows), static_cast<int>(columns), dtype, launch.stream()));
  return y;
}

Tensor embedding_rows(const Tensor& ids, const Tensor& weight) {
  constexpr Check check{"embedding_rows"};
  check.dtype(ids, ScalarType::Long, "ids", "int64");
  check.shape(ids, {-1}, "ids", "(M,)");
  check.contiguous(ids, "ids");
  check.float_dtype(weight, "weight");
  check.shape(weight, {-1, -1}, "weight", "(V, D)");
  check.contiguous(weight, "weight");
  check.aligned(weight, 16, "weight");
  check.same_device(weight, ids, "ids");
  const int64_t rows = ids.size(0), columns = weight.size(1);
  check(columns >= 8 && columns % 8 == 0 && columns <= kMaxInt, "D must be a positive multiple of 8, got ", columns);
  check(rows <= 65535, "takes up to 65535 ids, got ", rows);
  const Launch launch(weight);
  Tensor y = launch.empty({rows, columns}, weight.scalar_type());
  if (rows == 0) return y;
  check.launched(launch_embedding_rows({data<int64_t>(ids), data(weight), y.data_ptr(), weight.size(0),
                                        static_cast<int>(rows), static_cast<int>(columns / 8)},
                                       launch.stream()));
  return y;
}

std::tuple<Tensor, Tensor> rope_angles(const Tensor& positions, const Tensor& inv_freq, double scaling,
                                       const Tensor& like) {
  constexpr Check check{"rope_angles"};
  check.shape(positions, {-1, -1}, "positions", "(B, T)");
  check.dtype(positions, ScalarType::Long, "positions", "int64");
  check.contiguous(positions, "positions");
  check.shape(inv_freq, {-1}, "inv_freq", "(D_rot / 2,)");
  check.dtype(inv_freq, ScalarType::Float, "inv_freq", "float32");
  check.contiguous(inv_freq, "inv_freq");
  check.same_device(positions, inv_freq, "inv_freq");
  const ScalarType type = like.scalar_type();
  const Dtype dtype = type == ScalarType::Float ? Dtype::kFloat32 : check.float_dtype(like, "like, if not float32,");
  const int64_t rows = positions.size(0) * positions.size(1), half = inv_freq.size(0);
  check(half >= 1 && half <= kMaxInt / 2, "inv_freq must not be empty");
  check(rows <= kMaxInt, "takes up to ", kMaxInt, " positions, got ", rows);
  const Launch launch(positions);
  Tensor cos = launch.empty({positions.size(0), positions.size(1), 2 * half}, type);
  Tensor sin = launch.empty({positions.size(0), positions.size(1), 2 * half}, type);
  if (rows == 0) return {cos, sin};
  check.launched(launch_rope_angles(data<int64_t>(positions), data<float>(inv_freq), static_cast<float>(scaling),
                                    cos.data_ptr(), sin.data_ptr(), static_cast<int>(rows), static_cast<int>(half),
                                    dtype, launch.stream()));
  return {cos, sin};
}

}  // namespace
}  // namespace hf_fastpath

STABLE_TORCH_LIBRARY_IMPL(hf_fastpath, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&hf_fastpath::rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&hf_fastpath::add_rms_norm));
  m.impl("swiglu", TORCH_BOX(&hf_fastpath::swiglu));
  m.impl("embedding_rows", TORCH_BOX(&hf_fastpath::embedding_rows));
  m.impl("rope_angles", TORCH_BOX(&hf_fastpath::rope_angles));
}
