// Appends to the caches that store every token by itself. A format F has:
//   Storage             its tensors, as the kernels get them
//   kCountStride        integers a head has in `lengths`, the first of which counts the tokens
//   place()             the entry of the first new token; all threads of a CTA call it, one that appends few tokens
//   Row                 what a lane stores of a row; quantize<T, kLanes>() makes it, store() puts it into an entry
//   finish()            what is left to do for a head that got few tokens, by one thread
#pragma once

#include "launch.cuh"

namespace hf_fastpath::kv {

// The rows of a KV head that got few tokens: of each token its key, its value and the queries that read the head.
struct FewRow {
  Side side;
  int64_t head;
  int token;

  __device__ __forceinline__ FewRow(int row, int64_t kv_head, int ratio) {
    const int place = row % (2 + ratio);
    token = row / (2 + ratio);
    side = place == 0 ? Side::kKey : place == 1 ? Side::kValue : Side::kQuery;
    head = side == Side::kQuery ? kv_head * ratio + place - 2 : kv_head;
  }

  template <typename T, bool kVector>
  __device__ __forceinline__ RowBits load(const KvNewTokens& p, int64_t batch, int lane) const {
    const KvRows& source = side == Side::kKey ? p.key : side == Side::kValue ? p.value : p.query;
    RowBits bits;
    bits.x = load_row<T, kVector>(source, batch, head, token, lane, p.dim);
    load_transform<T, kVector>(bits, p, side == Side::kQuery ? p.q_norm : p.k_norm, batch, token, lane);
    return bits;
  }
};

// A CTA takes a KV head of a row of the batch, all its new tokens and the query heads that read it.
template <typename F, typename T, int kLanes, bool kVector>
__global__ void __launch_bounds__(512)
    append_few_kernel(const __grid_constant__ KvNewTokens p, const __grid_constant__ typename F::Storage s) {
  const int slots = blockDim.x / kLanes, slot = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int64_t batch = blockIdx.y, pair = batch * p.kv_heads + blockIdx.x;
  const int ratio = p.query.data ? p.heads / p.kv_heads : 0, rows = (2 + ratio) * p.tokens;
  wait_for_previous_kernel();
  let_next_kernel_begin();
  int32_t* count = p.lengths ? p.lengths + pair * F::kCountStride : nullptr;
  const int stored = count ? *count : 0;
  RowBits bits = FewRow(min(slot, rows - 1), blockIdx.x, ratio).load<T, kVector>(p, batch, lane);
  const int64_t entry = F::place(s, p, pair, stored);
  for (int first = 0; first < rows; first += slots) {
    const FewRow row(min(first + slot, rows - 1), blockIdx.x, ratio);
    if (first) bits = row.load<T, kVector>(p, batch, lane);
    const uint4 transformed = transform<T, kLanes>(bits, p, p.k_norm != nullptr, lane);
    const uint4 x = row.side == Side::kValue ? bits.x : transformed;
    const typename F::Row quantized = F::template quantize<T, kLanes>(x);
    if (first + slot >= rows || kPerLane * lane >= p.dim) continue;
    if (row.side == Side::kQuery) {
      store_query(p, batch, row.head, row.token, lane, x);
    } else {
      F::store(s, row.side, pair * p.capacity + entry + row.token, p.dim, lane, quantized);
    }
  }
  __syncthreads();  // everybody has read the count
  if (threadIdx.x == 0) {
    if (count) *count = stored + p.tokens;
    F::finish(s, pair * p.capacity + entry, stored);
  }
}

// Keys and values of a prompt chunk, a CTA a tile of tokens of a head.
template <typename F, typename T, int kLanes, bool kVector>
__global__ void __launch_bounds__(kChunkThreads)
    append_chunk_kernel(const __grid_constant__ KvNewTokens p, const __grid_constant__ typename F::Storage s) {
  constexpr int kSlots = kChunkThreads / kLanes;
  const int slot = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int64_t batch = blockIdx.z, head = blockIdx.y, pair = batch * p.kv_heads + head;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kSlots * kChunkRows) + slot;
  wait_for_previous_kernel();
  let_next_kernel_begin();
  RowBits keys[kChunkRows] = {};
  uint4 values[kChunkRows] = {};
#pragma unroll
  for (int i = 0; i < kChunkRows; ++i) {
    const int64_t token = first + i * kSlots;
    if (token >= p.tokens) continue;
    keys[i].x = load_row<T, kVector>(p.key, batch, head, token, lane, p.dim);
    load_transform<T, kVector>(keys[i], p, p.k_norm, batch, token, lane);
    values[i] = load_row<T, kVector>(p.value, batch, head, token, lane, p.dim);
  }
  const int64_t stored = p.lengths ? p.lengths[pair * F::kCountStride] : 0;
  require_room(stored + p.tokens, p.capacity);
#pragma unroll
  for (int i = 0; i < kChunkRows; ++i) {
    const int64_t token = first + i * kSlots, entry = pair * p.capacity + stored + token;
    const uint4 key = transform<T, kLanes>(keys[i], p, p.k_norm != nullptr, lane);
    const typename F::Row key_row = F::template quantize<T, kLanes>(key);
    const typename F::Row value_row = F::template quantize<T, kLanes>(values[i]);
    if (token >= p.tokens || kPerLane * lane >= p.dim) continue;
    F::store(s, Side::kKey, entry, p.dim, lane, key_row);
    F::store(s, Side::kValue, entry, p.dim, lane, value_row);
  }
}

template <typename F>
cudaError_t launch_append_few(const KvNewTokens& p, const typename F::Storage& s, Dtype dtype, int least_threads,
                              cudaStream_t stream) {
  return for_row_shape(p, dtype, [&](auto type, auto lanes, auto vector) {
    const int rows = p.tokens * (2 + (p.query.data ? p.heads / p.kv_heads : 0));
    const int threads = std::clamp((rows * lanes + 31) / 32 * 32, least_threads, 512);
    return launch_kernel_early_if_possible(append_few_kernel<F, decltype(type), lanes, vector>,
                                           dim3(p.kv_heads, p.batch), threads, stream, p, s);
  });
}

template <typename F>
cudaError_t launch_append_tokens(const KvNewTokens& p, const typename F::Storage& s, Dtype dtype, cudaStream_t stream) {
  if (p.tokens <= kFewTokens) return launch_append_few<F>(p, s, dtype, 32, stream);
  const cudaError_t error = for_row_shape(p, dtype, [&](auto type, auto lanes, auto vector) {
    const int tile = kChunkThreads / lanes * kChunkRows;
    const dim3 grid((p.tokens + tile - 1) / tile, p.kv_heads, p.batch);
    return launch_kernel_early_if_possible(append_chunk_kernel<F, decltype(type), lanes, vector>, grid, kChunkThreads,
                                           stream, p, s);
  });
  return error != cudaSuccess ? error : launch_finish_chunk(p, dtype, F::kCountStride, stream);
}

}  // namespace hf_fastpath::kv
