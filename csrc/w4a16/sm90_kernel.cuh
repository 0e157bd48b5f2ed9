// The kernel of w4a16_gemm_sm90.cu and w4a16_gemm_swiglu.cu, and its launch.
//
// One warp fills a ring of stages of 128 columns (of 64 where tokens are many) in shared memory; two warpgroups
// multiply. All that a stage holds arrives by the engine that copies boxes of matrices, as it is in global memory, so
// that what is under way needs no registers: loads to registers that a loop keeps under way share scoreboards, where
// each waits for all.
//
// The packed weights are the A operand: a lane reads its 16 bytes of a tile, exchanges a few bits with its neighbours
// so that their columns have the order of x, and expands them in registers, where wgmma takes them. A weight is scaled
// and rounded to 16 bits there, as w4a16_dequantize does: with the scale applied to sums instead, a lane would need
// twice the registers for them.
//
// Where there are fewer tiles than multiprocessors, the CTAs of a cluster divide a tile's K and add their parts through
// each other's shared memory, in the order of K: the order of a sum depends on the shape and the variant, never on
// timing.
#pragma once

#include <type_traits>

#include "../common/launch.cuh"
#include "../common/memory.cuh"
#include "../common/ptx_sm90.cuh"
#include "../kernels.h"
#include "gemm.cuh"
#include "sm90_consume.cuh"
#include "sm90_stage.cuh"
#include "sm90_store.cuh"
#include "sm90_swiglu.cuh"

namespace hf_fastpath {

struct NoBuffer {};

// Tiles of few tokens are stored from registers: a CTA of theirs leaves room for another, which may be the next
// kernel's.
template <int kGroup, int kTokenTiles, int kStages, bool kPaired>
struct Shared {
  static constexpr bool kHasOutput = kTokenTiles >= 16 && !kPaired;
  Sm90Stage<kGroup, kTokenTiles> stages[kStages];
  std::conditional_t<kHasOutput, OutputBuffer<kTokenTiles>,
                     std::conditional_t<kPaired, SwigluExchange<kTokenTiles>, NoBuffer>>
      output;
  uint64_t full[kStages], empty[kStages], drained;
};

template <typename T, int kGroup, int kTokenTiles, int kStages, int kCtasPerSm, bool kSymmetric, typename Schedule>
__global__ void __launch_bounds__(kSm90Threads<kCtasPerSm>, kCtasPerSm)
    w4a16_gemm_sm90_kernel(const __grid_constant__ Sm90Params<T, Schedule> params) {
#ifdef HF_FASTPATH_SM90A
  using Memory = Shared<kGroup, kTokenTiles, kStages, Schedule::kPaired>;
  constexpr bool kMovesRegisters = hf_fastpath::kMovesRegisters<kCtasPerSm>;
  auto& shared = *reinterpret_cast<Memory*>(dynamic_shared());
  static_assert(sizeof shared.stages >= kTokenTiles * kGemmThreads * sizeof(float4));  // for store_sum_of_cluster()
  const int thread = threadIdx.x, lane = thread % 32, warp = uniform(thread / 32), cta = blockIdx.x;
  if (warp == kGemmWarps && lane == 0) prefetch_maps(params);
  if (thread == 0) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(shared.full + i, kFillArrivals);
      mbarrier_init(shared.empty + i, kGemmWarps);
    }
    mbarrier_init(&shared.drained, kGemmWarps);
    if constexpr (Schedule::kPaired) mbarrier_init(&shared.output.turn, kGemmWarps);
    fence_mbarrier_init();
  }
  __syncthreads();
  const bool whole = params.schedule.splits == 1;
  if (warp >= kGemmWarps) {
    if constexpr (kMovesRegisters) give_registers<kProducerRegisters>();
    if (warp == kGemmWarps) {
      produce<T, kGroup, kTokenTiles, kStages>(shared.stages, shared.full, shared.empty, params, params.schedule, cta,
                                               lane);
    }
    if (whole) return;
    wait_for_parts();
    wait_for_readers();
  } else {
    if constexpr (kMovesRegisters) take_registers<kConsumerRegisters>();
    wait_for_previous_kernel();  // for the residual; x, which comes first, has waited anyway
    float acc[kTokenTiles][4];
    const auto store_tile = [&](const float (&sums)[kTokenTiles][4], int tile) {
      if (!whole) return;
      const Place place = params.schedule.place(tile);
      if constexpr (Schedule::kPaired) {
        store_swiglu(sums, shared.output, params.gemm, place, warp, lane);
      } else {
        if constexpr (Memory::kHasOutput) {
          if (params.y_mapped) return store_boxes(sums, shared.output, params, place, thread);
        }
        store_fragments(sums, params.gemm, place, thread);
      }
    };
    consume<T, kGroup, kTokenTiles, kStages, kSymmetric>(acc, shared.stages, shared.full, shared.empty,
                                                         params.gemm.zeros != nullptr, params.schedule, cta, warp, lane,
                                                         store_tile);
    if (Memory::kHasOutput && thread % 128 == 0) tensor_stores_read();  // before the buffer is gone
    if (!whole) {
      store_sum_of_cluster(acc, reinterpret_cast<float4*>(shared.stages), &shared.drained, params, cta, thread);
    }
  }
#else
  __trap();  // launch() refuses before
#endif
}

template <typename T, int kGroup, int kTokenTiles, typename Schedule>
cudaError_t make_params(Sm90Params<T, Schedule>& params, const W4A16GemmArgs& a, int sm_count) {
  using Stage = Sm90Stage<kGroup, kTokenTiles>;
  constexpr int kGroups = Stage::kGroups, kParts = Schedule::kPaired ? 2 : 1;
  const GemmVariant& v = kGemmVariants[a.variant];
  params.gemm = gemm_params<T>(a);
  params.gemm.n /= kParts;
  params.schedule = {cluster_schedule(gemm_tiles(v, a.m, a.n, a.k), v.splits, v.ctas_per_sm * sm_count)};
  const GemmParams<T>& p = params.gemm;
  const int64_t rows = p.row_tiles / kParts;
  const int box_rows = kGemmWarps / kParts;
  const int tokens = 8 * v.token_tiles;
  const int64_t row_bytes = a.m == 1 ? (a.k + 7) / 8 * 16 : 2 * a.x_row_stride;
  params.x_mapped = p.x_aligned && row_bytes >= 2 * int64_t{a.k};
  params.y_mapped = !Schedule::kPaired && a.n % 8 == 0 && aligned_to(a.y, 16) && !a.residual;
  const int64_t groups = p.groups;
  const int64_t weight_bytes = int64_t{p.col_tiles} * 512;
  cudaError_t error =
      make_row_map(&params.weights, a.qweight, rows, weight_bytes, box_rows, 512 * Stage::kTiles, kParts);
  if (error == cudaSuccess)
    error = make_row_map(&params.scales, a.scales, rows, groups * 32, box_rows, kGroups * 32, kParts);
  if (error == cudaSuccess && a.zeros)
    error = make_row_map(&params.zeros, a.zeros, rows, groups * 16, box_rows, kGroups * 16, kParts);
  if (error == cudaSuccess && params.x_mapped) error = make_tensor_map(&params.x, a.x, a.m, a.k, row_bytes, tokens);
  if (error == cudaSuccess && params.y_mapped)
    error = make_tensor_map(&params.y, a.y, a.m, a.n, 2 * int64_t{a.n}, tokens);
  return error;
}

template <typename T, int kGroup, int kVariant, typename Schedule>
cudaError_t launch_sm90_variant(const W4A16GemmArgs& a, int sm_count, cudaStream_t stream) {
  constexpr GemmVariant v = kGemmVariants[kVariant];
  constexpr int kBytes = sizeof(Shared<kGroup, v.token_tiles, v.stages, Schedule::kPaired>);
  static_assert(kBytes <= (v.ctas_per_sm == 1 ? 227 : 113) * 1024);
  // Half the registers of a multiprocessor do not hold the sums of 64 tokens and twice the scales besides.
  constexpr int kCtasPerSm = kGroup == 32 && v.token_tiles == 8 ? 1 : v.ctas_per_sm;
  constexpr bool kCanBeSymmetric = std::is_same_v<T, __nv_bfloat16>;
  auto kernel = w4a16_gemm_sm90_kernel<T, kGroup, v.token_tiles, v.stages, kCtasPerSm, false, Schedule>;
  if constexpr (kCanBeSymmetric) {
    if (!a.zeros) kernel = w4a16_gemm_sm90_kernel<T, kGroup, v.token_tiles, v.stages, kCtasPerSm, true, Schedule>;
  }
  if (!is_for_this_gpu(kernel)) return cudaErrorNoKernelImageForDevice;
  Sm90Params<T, Schedule> params = {};
  const cudaError_t error = make_params<T, kGroup, v.token_tiles>(params, a, sm_count);
  if (error != cudaSuccess) return error;
  const ClusterSchedule& s = params.schedule;
  const int ctas = s.clusters * s.splits;
  return launch_kernel_in_clusters(kernel, ctas, kSm90Threads<kCtasPerSm>, s.splits, kBytes, stream, params);
}

// Variants that differ in nothing but the cluster share a kernel: that of the first of them.
constexpr int variant_of(int token_tiles) {
  int i = kFirstSm90Variant;
  while (kGemmVariants[i].token_tiles != token_tiles) ++i;
  return i;
}

}  // namespace hf_fastpath
