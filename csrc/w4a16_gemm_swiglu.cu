// y = silu(x @ gate.T) * (x @ up.T) for more than 16 rows of x, gate and up one weight packed int4
// (hf_fastpath/packing.py), by wgmma: compute capability 9.0. The tiles of w4a16_gemm_sm90.cu that decoding takes.
#include "w4a16/sm90_kernel.cuh"

namespace hf_fastpath {
namespace {

template <typename T, int kGroup>
cudaError_t launch_variant(const W4A16GemmArgs& a, int sm_count, cudaStream_t stream) {
  switch (kGemmVariants[a.variant].token_tiles) {
    case 4:
      return launch_sm90_variant<T, kGroup, variant_of(4), PairedSchedule>(a, sm_count, stream);
    case 8:
      return launch_sm90_variant<T, kGroup, variant_of(8), PairedSchedule>(a, sm_count, stream);
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

bool w4a16_gemm_swiglu_has(int variant) {
  return variant >= kFirstSm90Variant && kGemmVariants[variant].token_tiles <= 8;
}

cudaError_t launch_w4a16_gemm_swiglu(const W4A16GemmArgs& args, Dtype dtype, int sm_count, cudaStream_t stream) {
  if (!w4a16_gemm_swiglu_has(args.variant) || args.n % 32 || args.residual) return cudaErrorInvalidValue;
  if (dtype == Dtype::kFloat16) return launch_for_group<__half>(args, sm_count, stream);
  return launch_for_group<__nv_bfloat16>(args, sm_count, stream);
}

}  // namespace hf_fastpath
