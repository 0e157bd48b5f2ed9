// y = x @ W.T + bias for many rows of x and W packed int4 (hf_fastpath/packing.py), by wgmma: compute capability 9.0.
//
// A warpgroup of producers fills a ring of stages of 128 columns in shared memory; two warpgroups of consumers
// multiply. The packed weights are the A operand: a lane reads its 16 bytes of a tile from shared memory and expands
// them in registers, where wgmma takes them, so a 16-bit weight is never in any memory. While one group of wgmma runs,
// the next fragments are expanded.
//
// The order of columns inside a fragment is the weights' (see packing.py: a lane has eight neighbouring columns), so
// the B operand, x, must have it too. Producers load x into registers and store its pairs of columns where they belong.
#include "common/memory.cuh"
#include "common/ptx_sm90.cuh"
#include "kernels.h"
#include "w4a16/consume_sm90.cuh"
#include "w4a16/gemm.cuh"
#include "w4a16/produce_sm90.cuh"

namespace hf_fastpath {
namespace {

constexpr int kThreads = kProducerThreads + kGemmThreads;

template <typename T, int kGroup, int kVariant>
__global__ void __launch_bounds__(kThreads, 1) w4a16_gemm_sm90_kernel(const GemmParams<T> p) {
#ifdef HF_FASTPATH_SM90A
  constexpr GemmVariant v = kGemmVariants[kVariant];
  // Of the 168 registers that each of 384 threads has at the start, producers give some to consumers. kXRegisters of
  // the producers' are for x that is under way.
  constexpr int kProducerRegisters = v.exact_weights ? 104 : 88, kConsumerRegisters = v.exact_weights ? 200 : 208;
  constexpr int kXRegisters = v.exact_weights ? 64 : 32;
  using Stage = Sm90Stage<kGroup, v.row_tiles, v.token_tiles>;
  unsigned char* shared = dynamic_shared();
  auto* stages = reinterpret_cast<Stage*>(shared);
  auto* full = reinterpret_cast<uint64_t*>(shared + v.stages * sizeof(Stage));
  auto* empty = full + v.stages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < v.stages; ++i) {
      mbarrier_init(full + i, kFillArrivals);
      mbarrier_init(empty + i, kGemmWarps);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  let_next_kernel_begin();
  const int cta = blockIdx.x;
  if (threadIdx.x < kProducerThreads) {
    give_registers<kProducerRegisters>();
    produce<kXRegisters, T, kGroup, v.row_tiles, v.token_tiles, v.stages>(stages, full, empty, p, cta, threadIdx.x);
  } else {
    take_registers<kConsumerRegisters>();
    consume<T, kGroup, v.row_tiles, v.token_tiles, v.stages, v.exact_weights>(stages, full, empty, p, cta,
                                                                              threadIdx.x - kProducerThreads);
  }
#else
  __trap();  // launch() refuses before
#endif
}

template <typename T, int kGroup, int kVariant>
cudaError_t launch(const GemmParams<T>& p, bool early_sum, cudaStream_t stream) {
  constexpr GemmVariant v = kGemmVariants[kVariant];
  constexpr int kBytes = v.stages * (sizeof(Sm90Stage<kGroup, v.row_tiles, v.token_tiles>) + 2 * sizeof(uint64_t));
  static_assert(kBytes <= 227 * 1024);
  const auto kernel = w4a16_gemm_sm90_kernel<T, kGroup, kVariant>;
  if (!is_for_this_gpu(kernel)) return cudaErrorNoKernelImageForDevice;
  const cudaError_t error = launch_kernel_with_shared(kernel, p.schedule.ctas, kThreads, kBytes, stream, p);
  return error == cudaSuccess ? launch_gemm_sum<T, v.row_tiles, v.token_tiles>(p, early_sum, stream) : error;
}

// Variants that differ in nothing but how they are launched share a kernel.
template <typename T, int kGroup>
cudaError_t launch_variant(const W4A16GemmArgs& a, int sm_count, cudaStream_t stream) {
  const GemmParams<T> p = gemm_params<T>(a, sm_count);
  const bool early_sum = kGemmVariants[a.variant].early_sum;
  switch (a.variant) {
    case 4:
      return launch<T, kGroup, 4>(p, early_sum, stream);
    case 5:
    case 7:
      return launch<T, kGroup, 5>(p, early_sum, stream);
    case 6:
    case 8:
      return launch<T, kGroup, 6>(p, early_sum, stream);
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
