// What w4a16_gemm.cu has beyond gemm.cuh: tiles whose K is divided among CTAs ("stream-K"), and the kernel that adds
// the parts.
#pragma once

#include "../common/launch.cuh"
#include "gemm.cuh"
#include "schedule.cuh"

namespace hf_fastpath {

template <typename T>
struct StreamKParams : GemmParams<T> {
  float4* partial;  // [slot][token tile][thread]
  Schedule schedule;
};

inline Schedule gemm_schedule(const GemmVariant& v, int m, int n, int k, int sm_count) {
  return stream_k_schedule(gemm_tiles(v, m, n, k), v.ctas_per_sm * sm_count);
}

template <typename T, int kTokenTiles>
__device__ __forceinline__ void store_tile(const float (&acc)[kTokenTiles][4], const StreamKParams<T>& p,
                                           const Cursor& at, int cta, int thread) {
  const int warp = thread / 32, lane = thread % 32;
  const bool whole = at.did_all(p.schedule);
  const Place place = p.schedule.place(at.tile);
  const int64_t slot = p.schedule.slot(cta, at.tile);
#pragma unroll
  for (int c = 0; c < kTokenTiles; ++c) {
    if (whole) {
      const int row_tile = place.row_block * kGemmWarps + warp;
      store_fragment(acc[c], p, row_tile, (place.token_block * kTokenTiles + c) * 8, lane);
    } else {
      p.partial[(slot * kTokenTiles + c) * kGemmThreads + thread] =
          make_float4(acc[c][0], acc[c][1], acc[c][2], acc[c][3]);
    }
  }
}

// Adds the parts of the tiles that several CTAs computed, in the order of K. One CTA a tile and token tile.
template <typename T, int kTokenTiles>
__global__ void __launch_bounds__(kGemmThreads) w4a16_gemm_sum_kernel(const StreamKParams<T> p) {
  const Schedule& s = p.schedule;
  const int tile = blockIdx.x, c = blockIdx.y;
  const int64_t unit = static_cast<int64_t>(tile) * s.units;
  const int first = s.owner(unit), last = s.owner(unit + s.units - 1);
  if (first == last) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float sum[4] = {};
  for (int cta = first; cta <= last; ++cta) {
    const float4 part = p.partial[(s.slot(cta, tile) * kTokenTiles + c) * kGemmThreads + threadIdx.x];
    sum[0] += part.x, sum[1] += part.y, sum[2] += part.z, sum[3] += part.w;
  }
  const Place place = s.place(tile);
  store_fragment(sum, p, place.row_block * kGemmWarps + warp, (place.token_block * kTokenTiles + c) * 8, lane);
}

template <typename T, int kTokenTiles>
cudaError_t launch_gemm_sum(const StreamKParams<T>& p, cudaStream_t stream) {
  if (!p.schedule.has_partial_tiles()) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(p.schedule.count()), kTokenTiles);
  return launch_kernel(w4a16_gemm_sum_kernel<T, kTokenTiles>, grid, kGemmThreads, stream, p);
}

// Floats of `partial` that a schedule needs.
inline int64_t partial_floats(const Schedule& s, int token_tiles) {
  return s.has_partial_tiles() ? int64_t{2} * s.ctas * token_tiles * kGemmThreads * 4 : 0;
}

}  // namespace hf_fastpath
