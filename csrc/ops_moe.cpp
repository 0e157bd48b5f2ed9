// Mixtures of experts on CUDA: argument checks, dispatch on the dtype, launch (see ops_checks.h).
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops_checks.h"

namespace hf_fastpath {
namespace {

// A tensor that is like x's rows, or one of them.
void check_like(const Check& check, const Tensor& x, const Tensor& tensor, std::initializer_list<int64_t> sizes,
                const char* name, const char* meaning) {
  check(tensor.scalar_type() == x.scalar_type(), name, " and x must have the same dtype");
  check.shape(tensor, sizes, name, meaning);
  check.contiguous(tensor, name);
  check.aligned(tensor, 16, name);
  check.same_device(x, tensor, name);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_router(const Tensor& x, const Tensor& weight,
                                                      const std::optional<Tensor>& expert_bias, int64_t top_k,
                                                      bool normalize, double scaling,
                                                      const std::optional<Tensor>& norm_weight, double norm_eps) {
  constexpr Check check{"moe_router"};
  check.shape(x, {-1, -1}, "x", "(M, H)");
  check.shape(weight, {-1, x.size(1)}, "weight", "(E, H)");
  const int64_t m = x.size(0), hidden = x.size(1), experts = weight.size(0);
  const Dtype dtype = check.float_dtype(x, "x");
  check(weight.scalar_type() == x.scalar_type(), "weight and x must have the same dtype");
  check(hidden >= 32 && hidden % 32 == 0 && hidden <= kMaxInt / 2, "H must be a positive multiple of 32, got ", hidden);
  check(experts >= 1 && experts <= kMaxRouterExperts, "takes up to ", kMaxRouterExperts, " experts, got ", experts);
  check(top_k >= 1 && top_k <= experts, "top_k must be in 1 to ", experts, ", the number of experts, got ", top_k);
  check(top_k <= kMaxRouterTopK, "top_k must be at most ", kMaxRouterTopK, ", got ", top_k);
  check(m <= kMaxInt / 64, "M is too large: ", m);
  for (const auto& [tensor, name] : {std::pair<const Tensor&, const char*>{x, "x"}, {weight, "weight"}}) {
    check.contiguous(tensor, name);
    check.aligned(tensor, 16, name);
    check.same_device(x, tensor, name);
  }
  if (expert_bias) {
    check.dtype(*expert_bias, ScalarType::Float, "expert_bias", "float32");
    check.shape(*expert_bias, {experts}, "expert_bias", "(E,)");
    check.contiguous(*expert_bias, "expert_bias");
    check.same_device(x, *expert_bias, "expert_bias");
  }
  if (norm_weight) check_like(check, x, *norm_weight, {hidden}, "norm_weight", "(H,)");
  const Launch launch(x);
  Tensor normalized = launch.empty({norm_weight ? m : 0, hidden}, x.scalar_type());
  Tensor logits = launch.empty({m, experts}, x.scalar_type());
  Tensor shares = launch.empty({m, top_k}, x.scalar_type()), chosen = launch.empty({m, top_k}, ScalarType::Long);
  if (m == 0) return {logits, shares, chosen, normalized};
  const MoeRouterArgs args{data(x),
                           data(weight),
                           data<float>(expert_bias),
                           logits.data_ptr(),
                           shares.data_ptr(),
                           static_cast<int64_t*>(chosen.data_ptr()),
                           static_cast<int>(m),
                           static_cast<int>(hidden),
                           static_cast<int>(experts),
                           static_cast<int>(top_k),
                           normalize,
                           static_cast<float>(scaling)};
  check.launched(launch_moe_router(args, data(norm_weight), static_cast<float>(norm_eps), normalized.data_ptr(), dtype,
                                   launch.sm_count(), launch.stream()));
  return {logits, shares, chosen, normalized};
}

// The experts' packed weights of one product, (N, K) each: hf_fastpath/packing.py, with a first dimension E.
MoeWeight check_stack(const Check& check, const Tensor& x, const char* name, const Tensor& qweight,
                      const Tensor& scales, const std::optional<Tensor>& zeros, int64_t experts, int64_t n, int64_t k,
                      int64_t group_size) {
  const std::string prefix = std::string(name) + "_", q = prefix + "qweight", s = prefix + "scales",
                    z = prefix + "zeros";
  check(group_size == 32 || group_size == 64 || group_size == 128, prefix, "group_size must be 32, 64 or 128, got ",
        group_size);
  check(k % group_size == 0, prefix, "group_size ", group_size, " must divide ", k);
  check.dtype(qweight, ScalarType::Int, q.c_str(), "int32");
  check.shape(qweight, {experts, n / 16, (k + 63) / 64, 32, 4}, q.c_str(), "(E, N/16, ceil(K/64), 32, 4)");
  check(scales.scalar_type() == x.scalar_type(), s, " and x must have the same dtype");
  check.shape(scales, {experts, n / 16, k / group_size, 16}, s.c_str(), "(E, N/16, K/group, 16)");
  if (zeros) {
    check.dtype(*zeros, ScalarType::Byte, z.c_str(), "uint8");
    check.shape(*zeros, {experts, n / 16, k / group_size, 16}, z.c_str(), "(E, N/16, K/group, 16)");
  }
  const auto check_memory = [&](const Tensor& tensor, const std::string& what) {
    check.contiguous(tensor, what.c_str());
    check.aligned(tensor, 16, what.c_str());
    check.same_device(x, tensor, what.c_str());
  };
  check_memory(qweight, q);
  check_memory(scales, s);
  if (zeros) check_memory(*zeros, z);
  return {data(qweight), data(scales), data<uint8_t>(zeros), static_cast<int>(group_size)};
}

void check_pairs(const Check& check, const Tensor& x, const Tensor& experts, const Tensor& shares) {
  check.shape(x, {-1, -1}, "x", "(M, H)");
  check.contiguous(x, "x");
  check.aligned(x, 16, "x");
  check.dtype(experts, ScalarType::Long, "experts", "int64");
  check.shape(experts, {x.size(0), -1}, "experts", "(M, K)");
  check.contiguous(experts, "experts");
  check.same_device(x, experts, "experts");
  const int64_t top_k = experts.size(1);
  check(top_k >= 1 && top_k <= kMaxTopK, "takes 1 to ", kMaxTopK, " experts a row, got ", top_k);
  check(shares.scalar_type() == x.scalar_type(), "shares and x must have the same dtype");
  check.shape(shares, {x.size(0), top_k}, "shares", "(M, K)");
  check.contiguous(shares, "shares");
  check.same_device(x, shares, "shares");
}

Tensor moe_experts(const Tensor& x, const Tensor& experts, const Tensor& shares, const Tensor& gate_up_qweight,
                   const Tensor& gate_up_scales, const std::optional<Tensor>& gate_up_zeros, const Tensor& down_qweight,
                   const Tensor& down_scales, const std::optional<Tensor>& down_zeros, int64_t intermediate_size,
                   int64_t gate_up_group_size, int64_t down_group_size, int64_t variant,
                   const std::optional<Tensor>& residual) {
  constexpr Check check{"moe_experts"};
  const Dtype dtype = check.float_dtype(x, "x");
  check_pairs(check, x, experts, shares);
  const int64_t m = x.size(0), hidden = x.size(1), inner = intermediate_size, top_k = experts.size(1);
  check(hidden >= 32 && hidden % 32 == 0, "H must be a positive multiple of 32, got ", hidden);
  check(inner >= 32 && inner % 32 == 0, "intermediate_size must be a positive multiple of 32, got ", inner);
  check(variant >= 0 && variant < kMoeVariants, "variant must be in 0 to ", kMoeVariants - 1, ", got ", variant);
  check(hidden <= 1 << 24 && inner <= 1 << 24 && m <= kMaxInt / 64 / top_k, "M, H or intermediate_size is too large");
  check(gate_up_qweight.dim() == 5, "gate_up_qweight must have shape (E, N/16, ceil(K/64), 32, 4), got ",
        gate_up_qweight);
  const int64_t count = gate_up_qweight.size(0);
  check(count >= 1 && count <= kMaxInt / 256, "there must be at least one expert, got ", count);
  MoeExpertsArgs args = {};
  args.gate_up = check_stack(check, x, "gate_up", gate_up_qweight, gate_up_scales, gate_up_zeros, count, 2 * inner,
                             hidden, gate_up_group_size);
  args.down =
      check_stack(check, x, "down", down_qweight, down_scales, down_zeros, count, hidden, inner, down_group_size);
  if (residual) check_like(check, x, *residual, {m, hidden}, "residual", "(M, H)");
  const Launch launch(x);
  Tensor y = launch.empty({m, hidden}, x.scalar_type());
  if (m == 0) return y;
  args.x = data(x);
  args.experts = data<int64_t>(experts);
  args.shares = data(shares);
  args.y = y.data_ptr();
  args.rows = static_cast<int>(m);
  args.top_k = static_cast<int>(top_k);
  args.expert_count = static_cast<int>(count);
  args.hidden = static_cast<int>(hidden);
  args.intermediate = static_cast<int>(inner);
  if (variant == 0) {
    const Tensor workspace = launch.empty({m * top_k, inner}, x.scalar_type());
    args.inner = workspace.data_ptr();
    check.launched(launch_moe_experts(args, data(residual), dtype, launch.sm_count(), launch.stream()));
    return y;
  }
  check(count <= kMaxGroupedExperts, "variant ", variant, " takes up to ", kMaxGroupedExperts, " experts, got ", count);
  const Tensor workspace = launch.empty({(moe_grouped_workspace_bytes(args) + 3) / 4}, ScalarType::Float);
  const cudaError_t error = launch_moe_grouped(args, data(residual), workspace.data_ptr(), static_cast<int>(variant),
                                               dtype, launch.sm_count(), launch.stream());
  check(error != cudaErrorNoKernelImageForDevice, "variant ", variant,
        " needs a GPU of compute capability 9.0, and kernels that were compiled for sm_90a");
  check.launched(error);
  return y;
}

}  // namespace
}  // namespace hf_fastpath

STABLE_TORCH_LIBRARY_IMPL(hf_fastpath, CUDA, m) {
  m.impl("moe_router", TORCH_BOX(&hf_fastpath::moe_router));
  m.impl("moe_experts", TORCH_BOX(&hf_fastpath::moe_experts));
}
