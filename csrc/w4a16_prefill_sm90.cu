// y = x @ W.T + bias for hundreds of rows of x and more, W packed int4 (hf_fastpath/packing.py), by wgmma: compute
// capability 9.0.
//
// A warpgroup of producers fills a ring of stages of 64 columns in shared memory; two warpgroups of consumers multiply.
// x arrives as it is, by the engine that copies boxes of matrices. The packed weights are the A operand: producers
// exchange a few bits among lanes so that their columns have the order of x, consumers read them from shared memory and
// expand them in registers, where wgmma takes them. A weight is scaled and rounded to 16 bits there, as
// w4a16_dequantize does: with the scale applied to sums instead, a lane would need twice the registers for them.
#include "common/memory.cuh"
#include "common/ptx_sm90.cuh"
#include "kernels.h"
#include "w4a16/gemm.cuh"
#include "w4a16/prefill_consume.cuh"
#include "w4a16/prefill_produce.cuh"

namespace hf_fastpath {
namespace {

constexpr int kThreads = kPrefillProducerThreads + kGemmThreads;

template <int kGroup, int kVariant>
struct Shared {
  static constexpr GemmVariant v = kGemmVariants[kVariant];
  PrefillStage<kGroup, v.row_tiles, v.token_tiles> stages[v.stages];
  OutputBuffer<v.row_tiles, v.token_tiles> output;
  uint64_t full[v.stages], empty[v.stages];
};

template <typename T, int kGroup, int kVariant>
__global__ void __launch_bounds__(kThreads, 1)
    w4a16_prefill_sm90_kernel(const __grid_constant__ PrefillParams<T> params) {
#ifdef HF_FASTPATH_SM90A
  constexpr GemmVariant v = kGemmVariants[kVariant];
  // Of the 168 registers that each of 384 threads has at the start, producers give some to consumers.
  constexpr int kProducerRegisters = 104, kConsumerRegisters = 200, kAhead = v.row_tiles == 1 ? 4 : 2;
  auto& shared = *reinterpret_cast<Shared<kGroup, kVariant>*>(dynamic_shared());
  if (threadIdx.x == 0) {
    for (int i = 0; i < v.stages; ++i) {
      mbarrier_init(shared.full + i, kPrefillFillArrivals);
      mbarrier_init(shared.empty + i, kGemmWarps);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  let_next_kernel_begin();
  const int cta = blockIdx.x;
  if (threadIdx.x < kPrefillProducerThreads) {
    give_registers<kProducerRegisters>();
    produce<kAhead, T, kGroup, v.row_tiles, v.token_tiles, v.stages>(shared.stages, shared.full, shared.empty, params,
                                                                     cta, threadIdx.x);
  } else {
    take_registers<kConsumerRegisters>();
    consume<v.steps, T, kGroup, v.row_tiles, v.token_tiles, v.stages>(
        shared.stages, shared.output, shared.full, shared.empty, params, cta, threadIdx.x - kPrefillProducerThreads);
  }
#else
  __trap();  // launch() refuses before
#endif
}

template <typename T, int kGroup, int kVariant>
cudaError_t launch(const PrefillParams<T>& params, cudaStream_t stream) {
  constexpr GemmVariant v = kGemmVariants[kVariant];
  constexpr int kBytes = sizeof(Shared<kGroup, kVariant>);
  static_assert(kBytes <= 227 * 1024);
  const auto kernel = w4a16_prefill_sm90_kernel<T, kGroup, kVariant>;
  if (!is_for_this_gpu(kernel)) return cudaErrorNoKernelImageForDevice;
  const GemmParams<T>& p = params.gemm;
  const cudaError_t error = launch_kernel_with_shared(kernel, p.schedule.ctas, kThreads, kBytes, stream, params);
  return error == cudaSuccess ? launch_gemm_sum<T, v.row_tiles, v.token_tiles>(p, v.early_sum, stream) : error;
}

template <typename T>
cudaError_t make_params(PrefillParams<T>& params, const W4A16GemmArgs& a, int sm_count) {
  params.gemm = gemm_params<T>(a, sm_count);
  const int tokens = 8 * kGemmVariants[a.variant].token_tiles;
  const int64_t row_bytes = a.m == 1 ? (a.k + 7) / 8 * 16 : 2 * a.x_row_stride;
  params.x_mapped = params.gemm.x_aligned && row_bytes >= 2 * int64_t{a.k};
  params.y_mapped = a.n % 8 == 0 && aligned_to(a.y, 16);
  cudaError_t error = cudaSuccess;
  if (params.x_mapped) error = make_tensor_map(&params.x, a.x, a.m, a.k, row_bytes, tokens);
  if (params.y_mapped && error == cudaSuccess)
    error = make_tensor_map(&params.y, a.y, a.m, a.n, 2 * int64_t{a.n}, tokens);
  return error;
}

template <typename T, int kGroup>
cudaError_t launch_variant(const W4A16GemmArgs& a, int sm_count, cudaStream_t stream) {
  PrefillParams<T> params = {};
  const cudaError_t error = make_params(params, a, sm_count);
  if (error != cudaSuccess) return error;
  switch (a.variant) {
    case 9:
      return launch<T, kGroup, 9>(params, stream);
    case 10:
      return launch<T, kGroup, 10>(params, stream);
    case 11:
      return launch<T, kGroup, 11>(params, stream);
    case 12:
      return launch<T, kGroup, 12>(params, stream);
    case 13:
      return launch<T, kGroup, 13>(params, stream);
    case 14:
      return launch<T, kGroup, 14>(params, stream);
    case 15:
      return launch<T, kGroup, 15>(params, stream);
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

cudaError_t launch_w4a16_prefill_sm90(const W4A16GemmArgs& args, Dtype dtype, int sm_count, cudaStream_t stream) {
  if (dtype == Dtype::kFloat16) return launch_for_group<__half>(args, sm_count, stream);
  return launch_for_group<__nv_bfloat16>(args, sm_count, stream);
}

}  // namespace hf_fastpath
