// A mixture of SwiGLU experts for many rows of x, their weights packed int4, by wgmma: compute capability 9.0.
//
// Rows are sorted by expert first (moe/sort.cuh), so that each expert's product is one of consecutive rows; the
// products are those of w4a16_gemm_sm90.cu, with tiles that are counted on the GPU: nothing in the launches depends on
// data. The first product's results are rounded to 16 bits, and so is silu(gate) * up; those of the second stay in
// float32 until a row's sum is taken, in the order of its experts.
#include "common/launch.cuh"
#include "common/swiglu.cuh"
#include "moe/grouped_schedule.cuh"
#include "moe/sort.cuh"
#include "w4a16/sm90_consume.cuh"

namespace hf_fastpath {
namespace {

using namespace moe;

template <typename T>
struct GroupedParams : Sm90Operands<T> {
  const int* first_pair;
  float* products;  // the second product's results; nullptr: gemm.y has them, the first one's
  int experts;
};

template <int kGroup, int kTokenTiles, int kStages>
struct Shared {
  Sm90Stage<kGroup, kTokenTiles> stages[kStages];
  uint64_t full[kStages], empty[kStages];
  GroupedTable table;
};

// One 16 x 8 fragment in float32: lanes of one t store neighbouring outputs.
template <typename T>
__device__ __forceinline__ void store_floats(const float (&acc)[4], const GemmParams<T>& p, float* y, int row_tile,
                                             int first_token, int lane) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int token = first_token + 2 * (lane % 4) + i % 2, column = row_tile * 16 + lane / 4 + 8 * (i / 2);
    if (token < p.m && column < p.n) y[static_cast<int64_t>(token) * p.n + column] = acc[i];
  }
}

template <typename T, int kGroup, int kTokenTiles, int kStages, int kCtasPerSm>
__global__ void __launch_bounds__(kSm90Threads<kCtasPerSm>, kCtasPerSm)
    grouped_kernel(const __grid_constant__ GroupedParams<T> params) {
#ifdef HF_FASTPATH_SM90A
  auto& shared = *reinterpret_cast<Shared<kGroup, kTokenTiles, kStages>*>(dynamic_shared());
  const int thread = threadIdx.x, lane = thread % 32, warp = uniform(thread / 32), cta = blockIdx.x;
  if (thread == 0) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(shared.full + i, kFillArrivals);
      mbarrier_init(shared.empty + i, kGemmWarps);
    }
    fence_mbarrier_init();
  }
  wait_for_previous_kernel();
  const int row_tiles = params.gemm.row_tiles, row_blocks = (row_tiles + kGemmWarps - 1) / kGemmWarps;
  fill_table<kTokenTiles>(shared.table, params.first_pair, params.experts, row_blocks);
  const int units = (params.gemm.k + hf_fastpath::kUnitCols - 1) / hf_fastpath::kUnitCols;
  const GroupedSchedule schedule{&shared.table, params.experts, row_tiles,
                                 row_blocks,    units,          static_cast<int>(gridDim.x)};
  if (warp >= kGemmWarps) {
    if constexpr (kMovesRegisters<kCtasPerSm>) give_registers<kProducerRegisters>();
    if (warp == kGemmWarps) {
      produce<T, kGroup, kTokenTiles, kStages>(shared.stages, shared.full, shared.empty, params, schedule, cta, lane);
    }
  } else {
    if constexpr (kMovesRegisters<kCtasPerSm>) take_registers<kConsumerRegisters>();
    if (cta >= schedule.count()) return;
    float acc[kTokenTiles][4];
    const auto store_tile = [&](const float (&sums)[kTokenTiles][4], int tile) {
      const auto place = schedule.template place<kTokenTiles>(tile);
      GemmParams<T> limits = params.gemm;
      limits.m = shared.table.pair[place.expert + 1];
      const int row_tile = place.row_block * kGemmWarps + warp;
#pragma unroll
      for (int c = 0; c < kTokenTiles; ++c) {
        const int token = place.token + 8 * c;
        if (token >= limits.m) break;
        if (params.products) {
          store_floats(sums[c], limits, params.products, row_tile, token, lane);
        } else {
          store_fragment(sums[c], limits, row_tile, token, lane);
        }
      }
    };
    consume<T, kGroup, kTokenTiles, kStages, false>(acc, shared.stages, shared.full, shared.empty,
                                                    params.gemm.zeros != nullptr, schedule, cta, warp, lane,
                                                    store_tile);
  }
#else
  __trap();  // launch_product() refuses before
#endif
}

// silu(gate) * up, eight columns a thread.
template <typename T>
__global__ void __launch_bounds__(moe::kThreads)
    swiglu_kernel(const uint4* both, uint4* inner, int64_t count, int half) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * moe::kThreads + threadIdx.x;
  wait_for_previous_kernel();
  let_next_kernel_begin();
  if (i >= count) return;
  const int64_t row = i / half, unit = i % half;
  inner[i] = swiglu_pairs<T>(both[row * 2 * half + unit], both[row * 2 * half + half + unit]);
}

// What a turn works with, one after the other in the workspace.
struct Workspace {
  int *first, *order, *place;
  unsigned char *sorted, *both, *inner;
  float* products;  // where `sorted` and `both` were
  int64_t bytes;

  Workspace(void* base, const MoeExpertsArgs& a, int64_t pairs) {
    unsigned char* const begin = static_cast<unsigned char*>(base);
    int64_t at = 0;
    const auto take = [&](int64_t size) {
      unsigned char* const part = begin + at;
      at += (size + 127) / 128 * 128;
      return part;
    };
    first = reinterpret_cast<int*>(take(4 * (int64_t{a.expert_count} + 1)));
    order = reinterpret_cast<int*>(take(4 * pairs));
    place = reinterpret_cast<int*>(take(4 * pairs));
    inner = take(2 * pairs * a.intermediate);
    products = reinterpret_cast<float*>(begin + at);
    sorted = take(2 * pairs * a.hidden);
    both = take(4 * pairs * a.intermediate);
    const int64_t end = reinterpret_cast<unsigned char*>(products) - begin + 4 * pairs * a.hidden;
    bytes = std::max(at, end);
  }
};

int rows_of_turn(const MoeExpertsArgs& a) {
  return std::max(1, std::min(a.rows, kMaxGroupedPairs / a.top_k));
}

template <typename T, int kGroup, int kTokenTiles, int kStages, int kCtas>
cudaError_t launch_product(const MoeWeight& weight, int experts, const void* x, void* y, float* products,
                           const int* first_pair, int pairs, int n, int k, int sm_count, cudaStream_t stream) {
  using Memory = Shared<kGroup, kTokenTiles, kStages>;
  // As in w4a16_gemm_sm90.cu: the registers.
  constexpr int kCtasPerSm = kGroup == 32 && kTokenTiles == 8 ? 1 : kCtas;
  using Stage = Sm90Stage<kGroup, kTokenTiles>;
  static_assert(sizeof(Memory) <= (kCtas == 1 ? 227 : 113) * 1024);
  const auto kernel = grouped_kernel<T, kGroup, kTokenTiles, kStages, kCtasPerSm>;
  if (!is_for_this_gpu(kernel)) return cudaErrorNoKernelImageForDevice;
  const W4A16GemmArgs gemm{x,      k, weight.qweight, weight.scales, weight.zeros, nullptr, y, nullptr, pairs, n, k,
                           kGroup, 0};
  GroupedParams<T> params = {};
  params.gemm = gemm_params<T>(gemm);
  params.x_mapped = true;
  params.first_pair = first_pair;
  params.products = products;
  params.experts = experts;
  const GemmParams<T>& p = params.gemm;
  const int64_t row_tiles = int64_t{experts} * p.row_tiles, groups = p.groups;
  cudaError_t error = make_row_map(&params.weights, weight.qweight, row_tiles, int64_t{p.col_tiles} * 512, kGemmWarps,
                                   512 * Stage::kTiles);
  if (error == cudaSuccess)
    error = make_row_map(&params.scales, weight.scales, row_tiles, groups * 32, kGemmWarps, Stage::kGroups * 32);
  if (error == cudaSuccess && weight.zeros)
    error = make_row_map(&params.zeros, weight.zeros, row_tiles, groups * 16, kGemmWarps, Stage::kGroups * 16);
  if (error == cudaSuccess) error = make_tensor_map(&params.x, x, pairs, k, 2 * int64_t{k}, 8 * kTokenTiles);
  if (error != cudaSuccess) return error;
  return launch_kernel_early(kernel, kCtasPerSm * sm_count, kSm90Threads<kCtasPerSm>, sizeof(Memory), stream, params);
}

template <typename T, int kGroup>
cudaError_t launch_for_variant(int variant, const MoeWeight& weight, int experts, const void* x, void* y,
                               float* products, const int* first_pair, int pairs, int n, int k, int sm_count,
                               cudaStream_t stream) {
  const auto arguments = [&](auto launch) {
    return launch(weight, experts, x, y, products, first_pair, pairs, n, k, sm_count, stream);
  };
  switch (variant) {
    case 1:
      return arguments(launch_product<T, kGroup, 4, 6, 2>);
    case 2:
      return arguments(launch_product<T, kGroup, 8, 4, 2>);
    case 3:
      return arguments(launch_product<T, kGroup, 16, 8, 1>);
    case 4:
      return arguments(launch_product<T, kGroup, 32, 5, 1>);
  }
  return cudaErrorInvalidValue;
}

template <typename T>
cudaError_t launch_for_group(int variant, const MoeWeight& weight, int experts, const void* x, void* y, float* products,
                             const int* first_pair, int pairs, int n, int k, int sm_count, cudaStream_t stream) {
  const auto launch = weight.group_size == 32   ? launch_for_variant<T, 32>
                      : weight.group_size == 64 ? launch_for_variant<T, 64>
                                                : launch_for_variant<T, 128>;
  return launch(variant, weight, experts, x, y, products, first_pair, pairs, n, k, sm_count, stream);
}

template <typename... Args>
cudaError_t launch_simple(void (*kernel)(Args...), int64_t threads, cudaStream_t stream, Args... args) {
  const dim3 grid(static_cast<unsigned>((threads + moe::kThreads - 1) / moe::kThreads));
  return launch_kernel_early(kernel, grid, moe::kThreads, 0, stream, args...);
}

// Some of the rows: those that `a` has.
template <typename T>
cudaError_t launch_turn(const MoeExpertsArgs& a, const T* residual, const Workspace& w, int variant, int sm_count,
                        cudaStream_t stream) {
  const int pairs = a.rows * a.top_k;
  const Sorting sorting{a.experts, pairs, a.expert_count, w.first, w.order, w.place};
  cudaError_t error = launch_simple(sort_kernel, int64_t{a.expert_count} * moe::kThreads, stream, sorting);
  if (error != cudaSuccess) return error;
  error =
      launch_simple(gather_kernel, int64_t{pairs} * 32, stream, static_cast<const uint4*>(a.x),
                    static_cast<const int*>(w.order), reinterpret_cast<uint4*>(w.sorted), pairs, a.top_k, a.hidden / 8);
  if (error != cudaSuccess) return error;
  error = launch_for_group<T>(variant, a.gate_up, a.expert_count, w.sorted, w.both, nullptr, w.first, pairs,
                              2 * a.intermediate, a.hidden, sm_count, stream);
  if (error != cudaSuccess) return error;
  const int64_t units = int64_t{pairs} * a.intermediate / 8;
  error = launch_simple(swiglu_kernel<T>, units, stream, reinterpret_cast<const uint4*>(w.both),
                        reinterpret_cast<uint4*>(w.inner), units, a.intermediate / 8);
  if (error != cudaSuccess) return error;
  error = launch_for_group<T>(variant, a.down, a.expert_count, w.inner, nullptr, w.products, w.first, pairs, a.hidden,
                              a.intermediate, sm_count, stream);
  if (error != cudaSuccess) return error;
  return launch_simple(combine_kernel<T>, int64_t{a.rows} * a.hidden / 4, stream,
                       reinterpret_cast<const float4*>(w.products), static_cast<const int*>(w.place),
                       static_cast<const T*>(a.shares), residual, static_cast<T*>(a.y), a.rows, a.top_k, a.hidden);
}

template <typename T>
cudaError_t launch(MoeExpertsArgs a, const T* residual, void* workspace, int variant, int sm_count,
                   cudaStream_t stream) {
  const Workspace w(workspace, a, int64_t{rows_of_turn(a)} * a.top_k);
  const int all_rows = a.rows, most = rows_of_turn(a);
  for (int done = 0; done < all_rows; done += a.rows) {
    a.rows = std::min(most, all_rows - done);
    const cudaError_t error = launch_turn<T>(a, residual, w, variant, sm_count, stream);
    if (error != cudaSuccess) return error;
    if (residual) residual += static_cast<int64_t>(a.rows) * a.hidden;
    a.x = static_cast<const T*>(a.x) + static_cast<int64_t>(a.rows) * a.hidden;
    a.y = static_cast<T*>(a.y) + static_cast<int64_t>(a.rows) * a.hidden;
    a.experts += a.rows * a.top_k;
    a.shares = static_cast<const T*>(a.shares) + a.rows * a.top_k;
  }
  return cudaSuccess;
}

}  // namespace

int64_t moe_grouped_workspace_bytes(const MoeExpertsArgs& args) {
  return Workspace(nullptr, args, int64_t{rows_of_turn(args)} * args.top_k).bytes;
}

cudaError_t launch_moe_grouped(const MoeExpertsArgs& args, const void* residual, void* workspace, int variant,
                               Dtype dtype, int sm_count, cudaStream_t stream) {
  if (args.expert_count > kMaxGroupedExperts) return cudaErrorInvalidValue;
  const auto launch_as = [&](auto type) {
    using T = decltype(type);
    return launch<T>(args, static_cast<const T*>(residual), workspace, variant, sm_count, stream);
  };
  return dtype == Dtype::kFloat16 ? launch_as(__half()) : launch_as(__nv_bfloat16());
}

}  // namespace hf_fastpath
