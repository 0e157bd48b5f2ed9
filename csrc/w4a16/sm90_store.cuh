// How a tile of w4a16_gemm_sm90.cu leaves the accumulators: straight to global memory, through shared memory by the
// engine that copies boxes, or added to the parts of the other CTAs of its cluster.
#pragma once

#include "../common/ptx_sm90.cuh"
#include "gemm.cuh"
#include "sm90_stage.cuh"

namespace hf_fastpath {

template <int kTokenTiles>
struct __align__(1024) OutputBuffer {
  unsigned char rows[kGemmWarps / 4][8 * kTokenTiles][128];  // 64 outputs of each token, swizzled
};

template <typename T, int kTokenTiles>
__device__ __forceinline__ void store_fragments(const float (&acc)[kTokenTiles][4], const GemmParams<T>& p,
                                                const Place& place, int thread) {
  const FragmentStore<T> target(p, place.row_block * kGemmWarps + thread / 32, thread % 32);
#pragma unroll
  for (int c = 0; c < kTokenTiles; ++c) {
    const int first_token = (place.token_block * kTokenTiles + c) * 8;
    if (first_token >= p.m) break;
    target.store(acc[c], first_token);
  }
}

template <typename T, int kTokenTiles>
__device__ __forceinline__ void store_boxes(const float (&acc)[kTokenTiles][4], OutputBuffer<kTokenTiles>& buffer,
                                            const Sm90Params<T, ClusterSchedule>& params, const Place& place,
                                            int thread) {
  const GemmParams<T>& p = params.gemm;
  const int warp = thread / 32, lane = thread % 32, warpgroup = warp / 4;
  const bool leads = thread % 128 == 0;
  if (leads) tensor_stores_read();
  warpgroup_barrier(1 + warpgroup);
  float bias[2] = {};
  const int row = (place.row_block * kGemmWarps + warp) * 16 + lane / 4;
  if (p.bias && row < p.n) bias[0] = to_float(p.bias[row]);
  if (p.bias && row + 8 < p.n) bias[1] = to_float(p.bias[row + 8]);
  const int token = lane / 16 * 8 + lane % 8, chunk = warp % 4 * 2 + lane / 8 % 2;  // that the lane stores
  unsigned char* target = &buffer.rows[warpgroup][token][(chunk ^ token % 8) * 16];
#pragma unroll
  for (int c = 0; c < kTokenTiles; c += 2) {
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float (&part)[4] = acc[c + i / 2];
      const int h = i % 2;
      pairs[i] = pack_floats(part[2 * h] + bias[h], part[2 * h + 1] + bias[h], T());
    }
    store_transposed_8x8x4(target + c * 8 * 128, pairs);
  }
  fence_proxy_async();
  warpgroup_barrier(1 + warpgroup);
  if (!leads) return;
  const int column = (place.row_block * kGemmWarps + 4 * warpgroup) * 16;
  tensor_store(params.y, place.token_block * 8 * kTokenTiles, column, buffer.rows[warpgroup]);
}

constexpr int kMaxSplits = 8;  // the largest cluster that every GPU with clusters has

// The barriers of a cluster that adds its parts, for all threads of its CTAs: one before they are read, and one before
// a CTA may end, whose memory others read until then.
__device__ __forceinline__ void wait_for_parts() {
  cluster_barrier();
}
__device__ __forceinline__ void wait_for_readers() {
  cluster_barrier_of_readers();
}

// The parts that up to kRanks CTAs have of a thread's sums, and their sum, in the order of K.
template <int kRanks>
struct Parts {
  float4 of_rank[kRanks];

  __device__ __forceinline__ void load(const float4* own, int splits) {
#pragma unroll
    for (int rank = 0; rank < kRanks; ++rank) {
      if (rank < splits) of_rank[rank] = load_from_cluster(own, rank);
    }
  }
  __device__ __forceinline__ void add(float (&sum)[4], int splits) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = 0;
#pragma unroll
    for (int rank = 0; rank < kRanks; ++rank) {
      if (rank >= splits) continue;
      const float4& v = of_rank[rank];
      sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
    }
  }
};

// Adds the parts of the token tiles that are this CTA's, of up to kRanks CTAs, and stores them. The loads of several
// tiles are under way together: one takes most of a microsecond.
template <int kRanks, int kTokenTiles, typename T>
__device__ __forceinline__ void add_parts(const float4* parts, const Sm90Params<T, ClusterSchedule>& params, int cta,
                                          int thread) {
  constexpr int kTogether = kMaxSplits / kRanks < kTokenTiles ? kMaxSplits / kRanks : kTokenTiles;
  const ClusterSchedule& s = params.schedule;
  const Place place = s.place(cta / s.splits);
  const FragmentStore<T> target(params.gemm, place.row_block * kGemmWarps + thread / 32, thread % 32);
  const int tiles = min(kTokenTiles, (params.gemm.m - place.token_block * kTokenTiles * 8 + 7) / 8);
  for (int first = cta % s.splits; first < tiles; first += kTogether * s.splits) {
    Parts<kRanks> part[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int c = first + i * s.splits;
      if (c < tiles) part[i].load(parts + c * kGemmThreads + thread, s.splits);
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int c = first + i * s.splits;
      if (c >= tiles) break;
      float sum[4];
      part[i].add(sum, s.splits);
      target.store(sum, (place.token_block * kTokenTiles + c) * 8);
    }
  }
}

// Adds the parts that the CTAs of a cluster have of a tile, in the order of K, and stores it; each CTA adds some of the
// token tiles. `parts` is the ring's memory, and the warps that read the ring end the first phase of `drained`.
template <typename T, typename Schedule, int kTokenTiles>
__device__ __forceinline__ void store_sum_of_cluster(const float (&acc)[kTokenTiles][4], float4* parts,
                                                     uint64_t* drained, const Sm90Params<T, Schedule>& params, int cta,
                                                     int thread) {
  __syncwarp();
  if (thread % 32 == 0) mbarrier_arrive(drained);
  mbarrier_wait(drained, 0);
#pragma unroll
  for (int c = 0; c < kTokenTiles; ++c) {
    parts[c * kGemmThreads + thread] = make_float4(acc[c][0], acc[c][1], acc[c][2], acc[c][3]);
  }
  wait_for_parts();
  if (params.schedule.splits <= 2) {
    add_parts<2, kTokenTiles>(parts, params, cta, thread);
  } else if (params.schedule.splits <= 4) {
    add_parts<4, kTokenTiles>(parts, params, cta, thread);
  } else {
    add_parts<kMaxSplits, kTokenTiles>(parts, params, cta, thread);
  }
  wait_for_readers();
}

}  // namespace hf_fastpath
