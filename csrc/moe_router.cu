// The router of a mixture of experts: logits, the experts with the largest scores, and their shares; of x, or of its
// RMSNorm, which it then stores for the experts too.
//
// Eight rows of x and 16 experts meet in one mma.m16n8k16; x and the router's weight are read in the order in which
// they lie in memory, eight neighbouring columns a lane, since it does not matter which column the tensor core calls
// "k". The warps divide the columns, and where the GPU has clusters so do the CTAs of one, as a single multiprocessor
// would read the weight too slowly; their parts are added in the order of the columns. Then a warp ranks the experts of
// a row. For the norm each CTA sums the squares of whole rows, which are few, instead of waiting for the others.
#include "common/decode_norm.cuh"
#include "common/dtype.cuh"
#include "common/launch.cuh"
#include "common/memory.cuh"
#include "common/ptx_sm90.cuh"
#include "kernels.h"

namespace hf_fastpath {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kRows = 8;           // of x at a time; as many as warps, each of which ranks the experts of one
constexpr int kClusterSize = 8;    // CTAs
constexpr int kStepCols = 32;      // columns that a warp takes at a time
constexpr int kEarlyTiles = 2;     // of 16 experts, of whose weights a warp's first step is read before x is there
constexpr float kEpsilon = 1e-6f;  // in a share's denominator
static_assert(kRows == kWarps);

#if defined(HF_FASTPATH_EMULATED) || __CUDA_ARCH__ >= 900
constexpr bool kHasClusters = true;
#else
constexpr bool kHasClusters = false;
#endif

template <typename T>
struct Params {
  const T* x;
  const T* weight;
  const float* bias;
  T* logits;
  T* shares;
  int64_t* experts;
  int rows, hidden, expert_count, top_k;
  bool normalize;
  float scaling;
  const T* norm_weight;  // or nullptr: x is taken as it is
  float norm_eps;
  T* normalized;

  __host__ __device__ int padded_experts() const { return (expert_count + 15) / 16 * 16; }
};

// A CTA's shared memory: [warp][expert][row] of a warp's sums; [CTA][expert][row] of the cluster's, in the first one;
// [expert][row] of the logits; chosen experts of each row; 1 / rms of each row, for the norm.
struct Memory {
  float4* parts;
  float4* sums;
  float* logits;
  int* chosen;
  float* inverse;

  static __host__ __device__ int bytes(int padded, int ctas) {
    return padded * kRows * 4 * (kWarps + ctas + 1) + kRows * padded * 4 + kRows * 4;
  }
  __device__ __forceinline__ Memory(int padded, int ctas) {
    parts = reinterpret_cast<float4*>(dynamic_shared());
    sums = parts + kWarps * padded * kRows / 4;
    logits = reinterpret_cast<float*>(sums + ctas * padded * kRows / 4);
    chosen = reinterpret_cast<int*>(logits + padded * kRows);
    inverse = reinterpret_cast<float*>(chosen + padded * kRows);
  }
};

// The steps of columns that a warp of the cluster takes.
struct Share {
  int first, end;

  __device__ __forceinline__ Share(int hidden, int rank, int ctas) {
    const int steps = hidden / kStepCols, part = rank * kWarps + threadIdx.x / 32, parts = ctas * kWarps;
    first = steps * part / parts;
    end = steps * (part + 1) / parts;
  }
};

template <typename T>
__device__ __forceinline__ float rounded(float value) {
  return to_float(from_float<T>(value));
}

// This lane's eight columns of rows g and g + 8 of a tile of 16 experts, and of x's row g.
struct Fragment {
  uint4 low, high;
};

// A warp's way to its parts of the operands.
template <typename T>
struct Operands {
  const Params<T>& p;
  int g, column;  // column: of a step's

  __device__ __forceinline__ explicit Operands(const Params<T>& p)
      : p(p), g(threadIdx.x % 32 / 4), column(8 * (threadIdx.x % 4)) {}

  __device__ __forceinline__ Fragment weights(int tile, int step) const {
    const auto row = [&](int expert) {
      return p.weight + static_cast<int64_t>(min(expert, p.expert_count - 1)) * p.hidden + column + step * kStepCols;
    };
    return {load_early16(row(tile + g)), load_early16(row(tile + g + 8))};
  }
  __device__ __forceinline__ uint4 norm(int step) const {
    return p.norm_weight ? load_early16(p.norm_weight + column + step * kStepCols) : make_uint4(0, 0, 0, 0);
  }
  __device__ __forceinline__ uint4 raw_x(int first, int step) const {
    return load_early16(p.x + static_cast<int64_t>(min(first + g, p.rows - 1)) * p.hidden + column + step * kStepCols);
  }
  // What becomes of raw_x(). inverse: 1 / rms of row g. store: whether this is the first time.
  __device__ __forceinline__ uint4 x(const uint4& value, int first, int step, const uint4& norm, float inverse,
                                     bool store) const {
    if (!p.norm_weight) return value;
    const int at = column + step * kStepCols;
    const uint4 result = linear::normalized<T>(value, inverse, norm);
    if (store && first + g < p.rows) {
      *reinterpret_cast<uint4*>(p.normalized + static_cast<int64_t>(first + g) * p.hidden + at) = result;
    }
    return result;
  }
};

// What a warp reads of its first step before x is there.
struct Early {
  Fragment weights[kEarlyTiles];
  uint4 norm;

  template <typename T>
  __device__ __forceinline__ Early(const Params<T>& p, const Share& share) : weights{}, norm{} {
    if (share.first >= share.end) return;
    const Operands<T> operands(p);
#pragma unroll
    for (int i = 0; i < kEarlyTiles; ++i) {
      if (16 * i < p.padded_experts()) weights[i] = operands.weights(16 * i, share.first);
    }
    norm = operands.norm(share.first);
  }
};

// This warp's part of the sums of x's rows first .. first + 8. inverse: of the lane's row; raw_x: that of the share's
// first step.
template <typename T>
__device__ __forceinline__ void multiply(const Params<T>& p, const Memory& memory, const Share& share, int first,
                                         const Early& early, float inverse, const uint4& raw_x) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const Operands<T> operands(p);
  float* const parts = reinterpret_cast<float*>(memory.parts + warp * p.padded_experts() * kRows / 4);
  const auto add_step = [](float (&acc)[4], const Fragment& a, const uint4& b) {
    mma_m16n8k16<T>(acc, {a.low.x, a.high.x, a.low.y, a.high.y}, b.x, b.y);
    mma_m16n8k16<T>(acc, {a.low.z, a.high.z, a.low.w, a.high.w}, b.z, b.w);
  };
  const auto finish_tile = [&](float (&acc)[4], int tile, int from) {
    const bool store = tile == 0;
#pragma unroll 2
    for (int step = from; step < share.end; ++step) {
      const Fragment a = operands.weights(tile, step);
      const uint4 value = operands.raw_x(first, step);
      add_step(acc, a, operands.x(value, first, step, operands.norm(step), inverse, store));
    }
    *reinterpret_cast<float2*>(parts + (tile + g) * kRows + 2 * t) = make_float2(acc[0], acc[1]);
    *reinterpret_cast<float2*>(parts + (tile + g + 8) * kRows + 2 * t) = make_float2(acc[2], acc[3]);
  };
  const bool any = share.first < share.end;
  uint4 b = make_uint4(0, 0, 0, 0);
  if (any) b = operands.x(raw_x, first, share.first, early.norm, inverse, true);
#pragma unroll
  for (int i = 0; i < kEarlyTiles; ++i) {
    if (16 * i >= p.padded_experts()) break;
    float acc[4] = {};
    if (any) add_step(acc, early.weights[i], b);
    finish_tile(acc, 16 * i, share.first + 1);
  }
  for (int tile = 16 * kEarlyTiles; tile < p.padded_experts(); tile += 16) {
    float acc[4] = {};
    finish_tile(acc, tile, share.first);
  }
}

// 1 / rms of a row, by a warp: the sums of decode_norm.cuh's eight warps, in their order.
template <typename T>
__device__ __forceinline__ float inverse_rms_of(const Params<T>& p, int row) {
  const T* const begin = p.x + static_cast<int64_t>(min(row, p.rows - 1)) * p.hidden;
  float squares[linear::kWarpsOfRow] = {};
  for (int piece = 0; piece < p.hidden; piece += linear::kColsAtOnce) {
    uint4 values[linear::kWarpsOfRow];
#pragma unroll
    for (int w = 0; w < linear::kWarpsOfRow; ++w) {
      const int column = piece + 8 * (32 * w + static_cast<int>(threadIdx.x % 32));
      values[w] = column < p.hidden ? load_early16(begin + column) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int w = 0; w < linear::kWarpsOfRow; ++w) squares[w] = linear::add_squares<T>(squares[w], values[w]);
  }
#pragma unroll
  for (int w = 0; w < linear::kWarpsOfRow; ++w) squares[w] = warp_sum(squares[w]);
  return linear::inverse_rms(squares, p.hidden, p.norm_eps);
}

// The same of the only row, by the CTA: a warp takes what one of decode_norm.cuh's warps does.
template <typename T>
__device__ __forceinline__ float inverse_rms_of_one(const Params<T>& p, float* squares) {
  static_assert(kWarps == linear::kWarpsOfRow);
  float sum = 0.0f;
  for (int column = 8 * static_cast<int>(threadIdx.x); column < p.hidden; column += linear::kColsAtOnce) {
    sum = linear::add_squares<T>(sum, load_early16(p.x + column));
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = sum;
  __syncthreads();
  float all[kWarps];
#pragma unroll
  for (int w = 0; w < kWarps; ++w) all[w] = squares[w];
  return linear::inverse_rms(all, p.hidden, p.norm_eps);
}

__device__ __forceinline__ void add(float4& sum, const float4& part) {
  sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
}

// Where a score stands: NaN before all others, as in torch.sort; zeros of both signs are equal.
__device__ __forceinline__ uint32_t rank_key(float score) {
  if (score != score) return 0xffffffffu;
  const uint32_t bits = __float_as_uint(score + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The experts of one row by falling score, of equal ones the first: an expert's place is how many come before it. The
// row's logits become scores; keys[e] is where expert e's stands, and below all others from the last expert on.
template <typename T>
__device__ __forceinline__ void choose(const Params<T>& p, float* scores, uint32_t* keys, int* chosen, int64_t row,
                                       int lane) {
  const int padded = p.padded_experts();
  for (int e = lane; e < padded; e += 32) {
    const float score = rounded<T>(1.0f / (1.0f + expf(-scores[e])));
    scores[e] = score;
    keys[e] = e < p.expert_count ? rank_key(p.bias ? score + p.bias[e] : score) : 0;
  }
  __syncwarp();
  for (int e = lane; e < p.expert_count; e += 32) {
    const uint32_t key = keys[e];
    int place = 0;
#pragma unroll 4
    for (int i = 0; i < padded / 4; ++i) {
      const uint4 others = reinterpret_cast<const uint4*>(keys)[i];
      place += (others.x > key || (others.x == key && 4 * i < e)) +
               (others.y > key || (others.y == key && 4 * i + 1 < e)) +
               (others.z > key || (others.z == key && 4 * i + 2 < e)) +
               (others.w > key || (others.w == key && 4 * i + 3 < e));
    }
    if (place < p.top_k) chosen[place] = e;
  }
  __syncwarp();
  float share = 0.0f, sum = 0.0f;
  int expert = 0;
  if (lane < p.top_k) expert = chosen[lane], share = scores[expert];
  for (int k = 0; k < p.top_k; ++k) sum += __shfl_sync(0xffffffffu, share, k);
  if (p.normalize) share = rounded<T>(share / rounded<T>(rounded<T>(sum) + kEpsilon));
  if (lane >= p.top_k) return;
  p.shares[row * p.top_k + lane] = from_float<T>(share * p.scaling);
  p.experts[row * p.top_k + lane] = expert;
}

// Between the CTAs of a cluster, or the threads of a CTA that is alone.
template <int kCtas>
__device__ __forceinline__ void wait_for_sums() {
  if constexpr (kCtas > 1) {
    cluster_barrier();
  } else {
    __syncthreads();
  }
}

// Puts a CTA's sums where the first one of the cluster finds them.
template <int kCtas>
__device__ __forceinline__ void send_sums(const Memory& memory, int quads, int rank) {
  for (int i = threadIdx.x; i < quads; i += kThreads) {
    float4 sum = memory.parts[i];
#pragma unroll
    for (int part = 1; part < kWarps; ++part) add(sum, memory.parts[part * quads + i]);
    if constexpr (kCtas > 1) {
      store_to_cluster(memory.sums + rank * quads + i, 0, sum);
    } else {
      memory.sums[i] = sum;
    }
  }
}

// The logits, from the sums of all CTAs, by the first one.
template <typename T, int kCtas>
__device__ __forceinline__ void add_sums(const Memory& memory, int padded) {
  for (int i = threadIdx.x; i < padded * kRows / 4; i += kThreads) {
    float4 sum = memory.sums[i];
#pragma unroll
    for (int other = 1; other < kCtas; ++other) add(sum, memory.sums[other * (padded * kRows / 4) + i]);
    const int expert = i / 2, row = i % 2 * 4;
    const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) memory.logits[(row + j) * padded + expert] = rounded<T>(values[j]);
  }
}

template <typename T, int kCtas>
__device__ __forceinline__ void route(const Params<T>& p) {
  const int padded = p.padded_experts(), quads = padded * kRows / 4, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int rank = blockIdx.x % kCtas, clusters = gridDim.x / kCtas;
  const Memory memory(padded, kCtas);
  if constexpr (kCtas > 1) cluster_arrive();
  const Share share(p.hidden, rank, kCtas);
  for (int e = lane; e < p.expert_count; e += 32) {
    for (int step = share.first; step < share.end; ++step) {
      prefetch_l2(p.weight + static_cast<int64_t>(e) * p.hidden + step * kStepCols);
    }
  }
  const Early early(p, share);
  wait_for_previous_kernel();
  let_next_kernel_begin();
  for (int first = blockIdx.x / kCtas * kRows; first < p.rows; first += clusters * kRows) {
    uint4 raw_x = make_uint4(0, 0, 0, 0);
    if (share.first < share.end) raw_x = Operands<T>(p).raw_x(first, share.first);
    float inverse = 0.0f;
    if (p.norm_weight && p.rows == 1) {
      inverse = inverse_rms_of_one(p, memory.inverse);
    } else if (p.norm_weight) {
      const float value = inverse_rms_of(p, first + warp);
      if (lane == 0) memory.inverse[warp] = value;
      __syncthreads();
      inverse = memory.inverse[lane / 4];
    }
    multiply(p, memory, share, first, early, inverse, raw_x);
    __syncthreads();
    if constexpr (kCtas > 1) cluster_wait();  // the first CTA has begun, and has read the last rows' sums
    send_sums<kCtas>(memory, quads, rank);
    wait_for_sums<kCtas>();
    if (rank == 0) {
      add_sums<T, kCtas>(memory, padded);
      __syncthreads();
      float* const logits = memory.logits + warp * padded;
      const int64_t row = first + warp;
      if (row < p.rows) {
        for (int e = lane; e < p.expert_count; e += 32) p.logits[row * p.expert_count + e] = from_float<T>(logits[e]);
        // The warps' sums have been added: their memory is free.
        choose(p, logits, reinterpret_cast<uint32_t*>(memory.parts) + warp * padded, memory.chosen + warp * padded, row,
               lane);
      }
    }
    if (first + clusters * kRows >= p.rows) break;
    __syncthreads();
    if constexpr (kCtas > 1) cluster_arrive();
  }
}

template <typename T, int kCtas>
__global__ void __launch_bounds__(kThreads) moe_router_kernel(const Params<T> p) {
  if constexpr (kCtas == 1 || kHasClusters) {
    route<T, kCtas>(p);
  } else {
    __trap();  // launch() does not come here
  }
}

template <typename T>
cudaError_t launch(const MoeRouterArgs& a, const void* norm_weight, float norm_eps, void* normalized, int sm_count,
                   cudaStream_t stream) {
  const Params<T> p = {static_cast<const T*>(a.x),
                       static_cast<const T*>(a.weight),
                       a.bias,
                       static_cast<T*>(a.logits),
                       static_cast<T*>(a.shares),
                       a.experts,
                       a.rows,
                       a.hidden,
                       a.expert_count,
                       a.top_k,
                       a.normalize,
                       a.scaling,
                       static_cast<const T*>(norm_weight),
                       norm_eps,
                       static_cast<T*>(normalized)};
  const bool clustered = has_early_launch();
  const int bytes = Memory::bytes(p.padded_experts(), clustered ? kClusterSize : 1);
  const int blocks = (a.rows + kRows - 1) / kRows;
  if (clustered) {
    const int clusters = std::min(blocks, std::max(1, 2 * sm_count / kClusterSize));
    return launch_kernel_in_clusters(moe_router_kernel<T, kClusterSize>, clusters * kClusterSize, kThreads,
                                     kClusterSize, bytes, stream, p);
  }
  return launch_kernel_with_shared(moe_router_kernel<T, 1>, std::min(blocks, 2 * sm_count), kThreads, bytes, stream, p);
}

}  // namespace

cudaError_t launch_moe_router(const MoeRouterArgs& args, const void* norm_weight, float norm_eps, void* normalized,
                              Dtype dtype, int sm_count, cudaStream_t stream) {
  if (args.expert_count > kMaxRouterExperts || args.top_k > kMaxRouterTopK || args.hidden % kStepCols)
    return cudaErrorInvalidValue;
  return dtype == Dtype::kFloat16 ? launch<__half>(args, norm_weight, norm_eps, normalized, sm_count, stream)
                                  : launch<__nv_bfloat16>(args, norm_weight, norm_eps, normalized, sm_count, stream);
}

}  // namespace hf_fastpath
