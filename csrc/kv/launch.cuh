// What the launchers of the appending kernels share: which instance serves a call, and the kernel that follows the one
// of a prompt chunk.
#pragma once

#include <algorithm>

#include "../common/launch.cuh"
#include "rows.cuh"

namespace hf_fastpath::kv {

// Up to so many tokens a CTA takes all of a KV head, and counts them itself; more are spread over CTAs, none of which
// may count, since the others read the count.
constexpr int kFewTokens = 8;

inline bool rows_are_aligned(const KvRows& rows) {
  return aligned_to(rows.data, 16) && rows.stride_batch % 8 == 0 && rows.stride_head % 8 == 0 &&
         rows.stride_token % 8 == 0;
}

inline bool can_vectorize(const KvNewTokens& p) {
  for (const KvRows& rows : {p.query, p.key, p.value}) {
    if (!rows_are_aligned(rows)) return false;
  }
  for (const KvAngles& angles : {p.cos, p.sin}) {
    if (!aligned_to(angles.data, 16) || angles.stride_batch % 8 || angles.stride_token % 8) return false;
  }
  return aligned_to(p.q_norm, 16) && aligned_to(p.k_norm, 16);
}

// Calls launch(T(), lanes of a row, whether loads are vectors), the last two as constants.
template <typename T, typename Launch>
cudaError_t for_row_shape(const KvNewTokens& p, const Launch& launch) {
  if (!can_vectorize(p)) return launch(T(), std::integral_constant<int, 32>(), std::false_type());
  if (p.dim <= 64) return launch(T(), std::integral_constant<int, 8>(), std::true_type());
  if (p.dim <= 128) return launch(T(), std::integral_constant<int, 16>(), std::true_type());
  return launch(T(), std::integral_constant<int, 32>(), std::true_type());
}
template <typename Launch>
cudaError_t for_row_shape(const KvNewTokens& p, Dtype dtype, const Launch& launch) {
  return dtype == Dtype::kFloat16 ? for_row_shape<__half>(p, launch) : for_row_shape<__nv_bfloat16>(p, launch);
}

constexpr int kChunkThreads = 128;
constexpr int kChunkRows = 4;  // of a lane: so many loads are under way at once

// Queries of a prompt chunk, a CTA a tile of tokens of a head; and the count. Launched behind the kernel that stores
// the chunk, which reads the count.
template <typename T, int kLanes, bool kVector>
__global__ void __launch_bounds__(kChunkThreads) finish_chunk_kernel(const __grid_constant__ KvNewTokens p,
                                                                     int count_stride) {
  constexpr int kSlots = kChunkThreads / kLanes;
  const int slot = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int64_t head = blockIdx.y, batch = blockIdx.z;
  wait_for_previous_kernel();
  let_next_kernel_begin();
  if (blockIdx.x == 0 && head < p.kv_heads && threadIdx.x == 0) {
    p.lengths[(batch * p.kv_heads + head) * count_stride] += p.tokens;
  }
  if (p.query.data == nullptr) return;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kSlots * kChunkRows) + slot;
  RowBits bits[kChunkRows];
#pragma unroll
  for (int i = 0; i < kChunkRows; ++i) {
    const int64_t token = first + i * kSlots;
    bits[i] = {};
    if (token < p.tokens) {
      bits[i].x = load_row<T, kVector>(p.query, batch, head, token, lane, p.dim);
      load_transform<T, kVector>(bits[i], p, p.q_norm, batch, token, lane);
    }
  }
#pragma unroll
  for (int i = 0; i < kChunkRows; ++i) {
    const int64_t token = first + i * kSlots;
    float v[kPerLane];
    unpack<T>(v, bits[i].x);
    transform<T, kLanes>(v, bits[i], p, p.q_norm != nullptr, lane);
    if (token < p.tokens) store_query<T>(p, batch, head, token, lane, v);
  }
}

inline cudaError_t launch_finish_chunk(const KvNewTokens& p, Dtype dtype, int count_stride, cudaStream_t stream) {
  return for_row_shape(p, dtype, [&](auto type, auto lanes, auto vector) {
    const int tile = kChunkThreads / lanes * kChunkRows;
    const dim3 grid(p.query.data ? (p.tokens + tile - 1) / tile : 1, p.query.data ? p.heads : p.kv_heads, p.batch);
    return launch_kernel_early(finish_chunk_kernel<decltype(type), lanes, vector>, grid, kChunkThreads, 0, stream, p,
                               count_stride);
  });
}

}  // namespace hf_fastpath::kv
