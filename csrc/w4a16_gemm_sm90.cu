// y = residual + x @ W.T + bias for more than 16 rows of x, W packed int4 (hf_fastpath/packing.py), by wgmma: compute
// capability 9.0. What it does is in w4a16/sm90_kernel.cuh.
#include "w4a16/sm90_kernel.cuh"

namespace hf_fastpath {
namespace {

template <typename T, int kGroup>
cudaError_t launch_variant(const W4A16GemmArgs& a, int sm_count, cudaStream_t stream) {
  switch (kGemmVariants[a.variant].token_tiles) {
    case 4:
      return launch_sm90_variant<T, kGroup, variant_of(4), ClusterSchedule>(a, sm_count, stream);
    case 8:
      return launch_sm90_variant<T, kGroup, variant_of(8), ClusterSchedule>(a, sm_count, stream);
    case 16:
      return launch_sm90_variant<T, kGroup, variant_of(16), ClusterSchedule>(a, sm_count, stream);
    case 32:
      return launch_sm90_variant<T, kGroup, variant_of(32), ClusterSchedule>(a, sm_count, stream);
  }
  return cudaErrorInvalidValue;
}

template <typename T>
cudaError_t launch_for_group(const W4A16GemmArgs& a, int sm_count, cudaStream_t stream) {
  if (a.group_size == 32) return launch_variant<T, 32>(a, sm_count, stream);
  if (a.group_size == 64) return launch_variant<T, 64>(a, sm_count, stream);
  return launch_variant<T, 128>(a, sm_count, stream);
}

}  // namespace

cudaError_t launch_w4a16_gemm_sm90(const W4A16GemmArgs& args, Dtype dtype, int sm_count, cudaStream_t stream) {
  if (dtype == Dtype::kFloat16) return launch_for_group<__half>(args, sm_count, stream);
  return launch_for_group<__nv_bfloat16>(args, sm_count, stream);
}

}  // namespace hf_fastpath
