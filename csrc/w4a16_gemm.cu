// y = residual + x @ W.T + bias for more than 16 rows of x and W packed int4 (hf_fastpath/packing.py), by mma.sync: for
// every GPU from compute capability 8.0 on.
//
// Weights are the A operand, as in w4a16_linear.cu, and each fragment that was expanded from int4 meets all tokens of
// the CTA's tile. Everything arrives in shared memory by cp.async, in a ring of stages of 128 columns: the weights of a
// warp are read by that warp alone and wait there only so that they need no registers while they are under way.
// A lane needs eight consecutive columns of a token (see packing.py), one 16-byte load, so ldmatrix has no use.
//
// q - zero is exact in 16 bits, products and sums of a group are fp32, and the group's sum is multiplied by its scale
// in fp32, as in w4a16_linear.cu. The order of a sum depends on the shape and the GPU's size, never on timing.
#include "common/dequant.cuh"
#include "common/memory.cuh"
#include "kernels.h"
#include "w4a16/stream_k.cuh"

namespace hf_fastpath {
namespace {

// One stage of the ring. [warp] comes first everywhere: a warp's part is its own.
template <int kGroup, int kTokenTiles>
struct __align__(128) Stage {
  static constexpr int kGroups = kUnitCols / kGroup;
  uint4 weights[kGemmWarps][2][32];
  // Token-major; the four runs of 32 columns of a token are 64 bytes each, and odd tokens have them swapped in pairs,
  // so that the eight lanes that read 16 bytes together, four of each of two tokens, meet no bank twice.
  uint4 x[8 * kTokenTiles][16];
  uint16_t scales[kGemmWarps][kGroups][16];
  uint8_t zeros[kGemmWarps][kGroups][16];
};

__device__ __forceinline__ int x_chunk(int token, int chunk) {
  return chunk ^ (token % 2 * 4);
}

// What a lane copies of its warp's weights, scales and zeros of each unit of one tile of outputs. Beyond the last row
// tile there is that once more, which nobody stores; beyond the last column there is the last tile of columns, which
// meets zeros of x.
template <int kGroup>
struct WeightShare {
  static constexpr int kGroups = kUnitCols / kGroup;
  const uint4* first;   // in the first column of tiles
  int64_t first_group;  // of the row tile

  template <typename T>
  __device__ __forceinline__ WeightShare(const GemmParams<T>& p, int row_block, int warp, int lane) {
    const int64_t row_tile = min(row_block * kGemmWarps + warp, p.row_tiles - 1);
    first = p.qweight + row_tile * p.col_tiles * 32 + lane;
    first_group = row_tile * p.groups;
  }

  template <typename T, int kTokenTiles>
  __device__ __forceinline__ void copy(Stage<kGroup, kTokenTiles>& stage, const GemmParams<T>& p, int unit, int warp,
                                       int lane, uint64_t policy) const {
    const int i = lane % 16 / 2;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int64_t column = min(unit * 2 + c, p.col_tiles - 1);
      cp_async16_once(&stage.weights[warp][c][lane], first + column * 32, policy);
    }
    const int64_t group = (first_group + min(unit * kGroups + i, p.groups - 1)) * 16;
    if (lane < 2 * kGroups) {
      cp_async16(&stage.scales[warp][i][lane % 2 * 8], p.scales + group + lane % 2 * 8);
    } else if (lane >= 16 && lane < 16 + 2 * kGroups && lane % 2 == 0 && p.zeros) {
      cp_async16(&stage.zeros[warp][i][0], p.zeros + group);
    }
  }
};

template <typename T, int kGroup, int kTokenTiles>
__device__ __forceinline__ void load_x(Stage<kGroup, kTokenTiles>& stage, const GemmParams<T>& p, int token_block,
                                       int unit, int thread) {
  constexpr int kTokensAtOnce = kGemmThreads / 16;
  const int chunk = thread % 16, col = unit * kUnitCols + chunk * 8;
#pragma unroll
  for (int i = 0; i < 8 * kTokenTiles / kTokensAtOnce; ++i) {
    const int token = i * kTokensAtOnce + thread / 16, row = token_block * 8 * kTokenTiles + token;
    const bool valid = row < p.m && col < p.k;
    const T* source = p.x + (valid ? row * p.x_row_stride + col : 0);
    uint4* target = &stage.x[token][x_chunk(token, chunk)];
    if (p.x_aligned) {
      cp_async16(target, source, valid);
    } else {
      *target = valid ? load_8x16bit<false>(source) : make_uint4(0, 0, 0, 0);
    }
  }
}

// acc += scale * (the unit's products), for the warp's row tile and all tokens.
template <typename T, int kGroup, int kTokenTiles>
__device__ __forceinline__ void multiply_unit(float (&acc)[kTokenTiles][4], const Stage<kGroup, kTokenTiles>& stage,
                                              bool has_zeros, int warp, int lane) {
  constexpr int kGroups = kUnitCols / kGroup, kHalves = kGroup / 32;  // runs of 32 columns: half a packed tile
  const int g = lane / 4, t = lane % 4;
  uint4 words;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    float sum[kTokenTiles][4] = {};
    const uint32_t zero_lo = zero_pair<T>(has_zeros ? stage.zeros[warp][group][g] : 8);
    const uint32_t zero_hi = zero_pair<T>(has_zeros ? stage.zeros[warp][group][g + 8] : 8);
#pragma unroll
    for (int half = group * kHalves; half < (group + 1) * kHalves; ++half) {
      uint32_t a[2][4];
      if (half % 2 == 0) words = stage.weights[warp][half / 2][lane];
      int4_fragment<T>(half % 2 ? words.z : words.x, zero_lo, zero_hi, a[0]);
      int4_fragment<T>(half % 2 ? words.w : words.y, zero_lo, zero_hi, a[1]);
#pragma unroll
      for (int c = 0; c < kTokenTiles; ++c) {
        const uint4 b = stage.x[8 * c + g][x_chunk(g, 4 * half + t)];
        mma_m16n8k16<T>(sum[c], a[0], b.x, b.y);
        mma_m16n8k16<T>(sum[c], a[1], b.z, b.w);
      }
    }
    const float scale_lo = bits_to_float<T>(stage.scales[warp][group][g]);
    const float scale_hi = bits_to_float<T>(stage.scales[warp][group][g + 8]);
#pragma unroll
    for (int c = 0; c < kTokenTiles; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[c][i] = fmaf(sum[c][i], i < 2 ? scale_lo : scale_hi, acc[c][i]);
    }
  }
}

template <typename T, int kGroup, int kTokenTiles, int kStages, int kCtasPerSm>
__global__ void __launch_bounds__(kGemmThreads, kCtasPerSm) w4a16_gemm_kernel(const StreamKParams<T> p) {
  auto* stages = reinterpret_cast<Stage<kGroup, kTokenTiles>*>(dynamic_shared());
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const uint64_t policy = evict_first_policy();
  Cursor now(p.schedule, blockIdx.x);
  Cursor ahead = now;
  const Place place = p.schedule.place(ahead.tile);
  int token_block = place.token_block;
  WeightShare<kGroup> weights(p, place.row_block, warp, lane);
  const auto load_next = [&](int stage) {
    if (ahead.left) {
      weights.copy(stages[stage], p, ahead.unit, warp, lane, policy);
      load_x(stages[stage], p, token_block, ahead.unit, thread);
      if (ahead.advance(p.schedule)) {
        const Place next = p.schedule.place(ahead.tile);
        token_block = next.token_block;
        weights = WeightShare<kGroup>(p, next.row_block, warp, lane);
      }
    }
    cp_async_commit();  // even an empty group: cp_async_wait() counts them
  };
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) load_next(stage);
  float acc[kTokenTiles][4] = {};
  int stage = 0;
  while (now.left) {
    for (bool ended = false; !ended;) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // this stage is there for all, and nobody reads the one before it any more
      load_next(stage == 0 ? kStages - 1 : stage - 1);
      multiply_unit<T>(acc, stages[stage], p.zeros != nullptr, warp, lane);
      stage = stage + 1 == kStages ? 0 : stage + 1;
      ended = now.ends_tile(p.schedule);
      if (!ended) now.advance(p.schedule);
    }
    store_tile(acc, p, now, blockIdx.x, thread);
#pragma unroll
    for (int i = 0; i < kTokenTiles * 4; ++i) acc[i / 4][i % 4] = 0;
    now.advance(p.schedule);
  }
}

template <typename T, int kGroup, int kVariant>
cudaError_t launch(const W4A16GemmArgs& a, int sm_count, cudaStream_t stream) {
  constexpr GemmVariant v = kGemmVariants[kVariant];
  constexpr int kBytes = v.stages * sizeof(Stage<kGroup, v.token_tiles>);
  const StreamKParams<T> p{gemm_params<T>(a), reinterpret_cast<float4*>(a.workspace),
                           gemm_schedule(v, a.m, a.n, a.k, sm_count)};
  const auto kernel = w4a16_gemm_kernel<T, kGroup, v.token_tiles, v.stages, v.ctas_per_sm>;
  const cudaError_t error = launch_kernel_with_shared(kernel, p.schedule.ctas, kGemmThreads, kBytes, stream, p);
  return error == cudaSuccess ? launch_gemm_sum<T, v.token_tiles>(p, stream) : error;
}

template <typename T, int kGroup>
cudaError_t launch_variant(const W4A16GemmArgs& a, int sm_count, cudaStream_t stream) {
  return a.variant == 0 ? launch<T, kGroup, 0>(a, sm_count, stream) : launch<T, kGroup, 1>(a, sm_count, stream);
}

template <typename T>
cudaError_t launch_for_group(const W4A16GemmArgs& a, int sm_count, cudaStream_t stream) {
  if (a.group_size == 32) return launch_variant<T, 32>(a, sm_count, stream);
  if (a.group_size == 64) return launch_variant<T, 64>(a, sm_count, stream);
  return launch_variant<T, 128>(a, sm_count, stream);
}

}  // namespace

int64_t w4a16_gemm_workspace_floats(int m, int n, int k, int variant, int sm_count) {
  if (variant >= kFirstSm90Variant) return 0;
  const GemmVariant& v = kGemmVariants[variant];
  return partial_floats(gemm_schedule(v, m, n, k, sm_count), v.token_tiles);
}

cudaError_t launch_w4a16_gemm(const W4A16GemmArgs& args, Dtype dtype, int sm_count, cudaStream_t stream) {
  if (args.variant >= kFirstSm90Variant) return launch_w4a16_gemm_sm90(args, dtype, sm_count, stream);
  if (dtype == Dtype::kFloat16) return launch_for_group<__half>(args, sm_count, stream);
  return launch_for_group<__nv_bfloat16>(args, sm_count, stream);
}

}  // namespace hf_fastpath
