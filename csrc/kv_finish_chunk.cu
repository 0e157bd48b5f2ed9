// What follows the kernel that stores a prompt chunk in any cache: the chunk's queries, and the count.
#include "kv/launch.cuh"

namespace hf_fastpath::kv {
namespace {

// Queries of a prompt chunk, a CTA a tile of tokens of the heads that read a KV head; and the count.
template <typename T, int kLanes, bool kVector>
__global__ void __launch_bounds__(kChunkThreads)
    finish_chunk_kernel(const __grid_constant__ KvNewTokens p, int count_stride) {
  constexpr int kSlots = kChunkThreads / kLanes;
  const int slot = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int64_t kv_head = blockIdx.y, batch = blockIdx.z;
  wait_for_previous_kernel();
  let_next_kernel_begin();
  if (p.lengths && blockIdx.x == 0 && threadIdx.x == 0) {
    p.lengths[(batch * p.kv_heads + kv_head) * count_stride] += p.tokens;
  }
  if (p.query.data == nullptr) return;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kSlots * kChunkRows) + slot;
  const int64_t ratio = p.heads / p.kv_heads, first_head = kv_head * ratio;
  RowBits bits[kChunkRows] = {};
#pragma unroll
  for (int i = 0; i < kChunkRows; ++i) {
    const int64_t token = first + i * kSlots;
    if (token >= p.tokens) continue;
    bits[i].x = load_row<T, kVector>(p.query, batch, first_head, token, lane, p.dim);
    load_transform<T, kVector>(bits[i], p, p.q_norm, batch, token, lane);
  }
  for (int64_t head = first_head; head < first_head + ratio; ++head) {
    uint4 next[kChunkRows] = {};  // asked for before the work on this head begins
#pragma unroll
    for (int i = 0; i < kChunkRows; ++i) {
      const int64_t token = first + i * kSlots;
      if (token >= p.tokens || head + 1 == first_head + ratio) continue;
      next[i] = load_row<T, kVector>(p.query, batch, head + 1, token, lane, p.dim);
    }
#pragma unroll
    for (int i = 0; i < kChunkRows; ++i) {
      const int64_t token = first + i * kSlots;
      const uint4 x = transform<T, kLanes>(bits[i], p, p.q_norm != nullptr, lane);
      if (token < p.tokens) store_query(p, batch, head, token, lane, x);
      bits[i].x = next[i];
    }
  }
}

}  // namespace

cudaError_t launch_finish_chunk(const KvNewTokens& p, Dtype dtype, int count_stride, cudaStream_t stream) {
  return for_row_shape(p, dtype, [&](auto type, auto lanes, auto vector) {
    const int tile = kChunkThreads / lanes * kChunkRows;
    const dim3 grid(p.query.data ? (p.tokens + tile - 1) / tile : 1, p.kv_heads, p.batch);
    return launch_kernel_early_if_possible(finish_chunk_kernel<decltype(type), lanes, vector>, grid, kChunkThreads,
                                           stream, p, count_stride);
  });
}

}  // namespace hf_fastpath::kv
