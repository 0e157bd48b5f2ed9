// Mixtures of 16-bit experts on CUDA: argument checks, dispatch on the dtype, launch (see ops_checks.h).
#include <torch/csrc/stable/library.h>

#include "ops_checks.h"

namespace hf_fastpath {
namespace {

// What the kernel reads 16 bytes at a time, or as x's dtype.
void check_tensor(const Check& check, const Tensor& x, const Tensor& tensor, std::initializer_list<int64_t> sizes,
                  const char* name, const char* meaning) {
  check(tensor.scalar_type() == x.scalar_type(), name, " and x must have the same dtype");
  check.shape(tensor, sizes, name, meaning);
  check.contiguous(tensor, name);
  check.same_device(x, tensor, name);
}

Tensor moe_experts_16bit(const Tensor& x, const Tensor& experts, const Tensor& shares, const Tensor& gate_up,
                         const Tensor& down, const std::optional<Tensor>& residual) {
  constexpr Check check{"moe_experts_16bit"};
  const Dtype dtype = check.float_dtype(x, "x");
  check.shape(x, {-1, -1}, "x", "(M, H)");
  check.shape(down, {-1, x.size(1), -1}, "down", "(E, H, I)");
  const int64_t m = x.size(0), hidden = x.size(1), count = down.size(0), inner = down.size(2);
  check.dtype(experts, ScalarType::Long, "experts", "int64");
  check.shape(experts, {m, -1}, "experts", "(M, K)");
  check.contiguous(experts, "experts");
  check.same_device(x, experts, "experts");
  const int64_t top_k = experts.size(1);
  check(top_k >= 1 && top_k <= kMaxTopK, "takes 1 to ", kMaxTopK, " experts a row, got ", top_k);
  check(hidden >= 32 && hidden % 32 == 0, "H must be a positive multiple of 32, got ", hidden);
  check(inner >= 32 && inner % 32 == 0, "I must be a positive multiple of 32, got ", inner);
  check(count >= 1 && count <= kMaxInt / 32, "there must be at least one expert, got ", count);
  check(hidden <= 1 << 24 && inner <= 1 << 24 && m <= kMaxInt / 64 / top_k, "M, H or I is too large");
  check_tensor(check, x, x, {m, hidden}, "x", "(M, H)");
  check_tensor(check, x, shares, {m, top_k}, "shares", "(M, K)");
  check_tensor(check, x, gate_up, {count, 2 * inner, hidden}, "gate_up", "(E, 2 I, H)");
  check_tensor(check, x, down, {count, hidden, inner}, "down", "(E, H, I)");
  if (residual) check_tensor(check, x, *residual, {m, hidden}, "residual", "(M, H)");
  check.aligned(x, 16, "x");
  check.aligned(gate_up, 16, "gate_up");
  check.aligned(down, 16, "down");
  const Launch launch(x);
  Tensor y = launch.empty({m, hidden}, x.scalar_type());
  if (m == 0) return y;
  const Tensor workspace = launch.empty({m * top_k, inner}, x.scalar_type());
  const MoeExperts16Args args{data(x),
                              data<int64_t>(experts),
                              data(shares),
                              data(gate_up),
                              data(down),
                              data(residual),
                              workspace.data_ptr(),
                              y.data_ptr(),
                              static_cast<int>(m),
                              static_cast<int>(top_k),
                              static_cast<int>(count),
                              static_cast<int>(hidden),
                              static_cast<int>(inner)};
  check.launched(launch_moe_experts16(args, dtype, launch.sm_count(), launch.stream()));
  return y;
}

}  // namespace
}  // namespace hf_fastpath

STABLE_TORCH_LIBRARY_IMPL(hf_fastpath, CUDA, m) {
  m.impl("moe_experts_16bit", TORCH_BOX(&hf_fastpath::moe_experts_16bit));
}
