// Appends to the caches that quantize tokens in groups, each when it is full, and keep the others in full precision: the
// first few (sinks), and those of the group that is not full yet (the tail, where token t is entry t % group, tokens
// being numbered from behind the sinks). hf_fastpath/ops/_groups.py says the same in Python. A format F has:
//   Shared<kLanes>         what quantizing a group needs of shared memory
//   quantize<T, kLanes>()  stores a group. A lane has 8 tokens of 8 channels, as 16-bit values.
#pragma once

#include "append_tokens.cuh"

namespace hf_fastpath::kv {

constexpr int kTokensPerLane = 8;
constexpr int kMaxGroupThreads = 256;

// Where the new tokens of a KV head go.
struct Places {
  int64_t behind;      // tokens stored behind the sinks, before
  int taken;           // new tokens that become sinks
  int64_t first_open;  // the first token of the group that was not full
  int64_t full_end;    // behind the last group that is full now
  int64_t stored;

  __device__ __forceinline__ Places(int stored_tokens, int tokens, int group, int sinks) : stored(stored_tokens) {
    behind = max(stored_tokens - sinks, 0);
    taken = min(max(sinks - stored_tokens, 0), tokens);
    first_open = behind / group * group;
    full_end = (behind + tokens - taken) / group * group;
  }
};

// Where a row in full precision goes: to the sinks or the tail of a pair (row of the batch, KV head).
template <typename T>
__device__ __forceinline__ T* full_row(const KvFullSide& side, const Places& places, int64_t pair, int token, int group,
                                       int sinks, int dim) {
  if (token < places.taken) {
    return static_cast<T*>(side.sinks) + (pair * sinks + places.stored + token) * dim;
  }
  const int entry = static_cast<int>((places.behind + token - places.taken) % group);
  return static_cast<T*>(side.tail) + (pair * group + entry) * dim;
}

// The 8 tokens from `first` of one channel octet: of the tail, or new ones, transformed when they are keys.
template <typename T, int kLanes, bool kVector>
__device__ __forceinline__ void load_group(uint4 (&rows)[kTokensPerLane], const KvNewTokens& p, const KvFullSide& full,
                                           const Places& places, int64_t first, int group, bool is_value, int64_t batch,
                                           int64_t head, int lane) {
  const int64_t pair = batch * p.kv_heads + head;
#pragma unroll
  for (int i = 0; i < kTokensPerLane; ++i) {
    const int64_t token = first + i;
    if (token >= places.behind) {
      rows[i] = load_row<T, kVector>(is_value ? p.value : p.key, batch, head, token - places.behind + places.taken, lane,
                                     p.dim);
    } else {
      rows[i] = make_uint4(0, 0, 0, 0);
      const T* row = static_cast<const T*>(full.tail) + (pair * group + token % group) * p.dim;
      if (kPerLane * lane < p.dim) rows[i] = load_8<true>(row + kPerLane * lane);
    }
  }
  if (is_value || !(p.k_norm || p.rotary_dim || p.rotation)) return;
#pragma unroll
  for (int i = 0; i < kTokensPerLane; ++i) {
    const int64_t token = first + i;
    const bool is_new = token >= places.behind;
    RowBits bits;
    load_transform<T, kVector>(bits, p, p.k_norm, batch, is_new ? token - places.behind + places.taken : 0, lane);
    float v[kPerLane];
    unpack<T>(v, rows[i]);
    transform<T, kLanes>(v, bits, p, p.k_norm != nullptr, lane);
    if (is_new) rows[i] = pack<T>(v);
  }
}

// A CTA takes group `blockIdx.x` of those that new tokens fill. kFew: of a KV head, keys and values, with all its new
// tokens and the query heads that read it. Else of keys (the first half of the grid's y) or values alone.
template <typename F, typename T, int kLanes, bool kVector, bool kFew>
__global__ void __launch_bounds__(kMaxGroupThreads) append_groups_kernel(const __grid_constant__ KvNewTokens p,
                                                                         const __grid_constant__ KvGroupedStorage s) {
  __shared__ typename F::template Shared<kLanes> shared;
  const int slots = blockDim.x / kLanes, slot = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int64_t batch = blockIdx.z, head = blockIdx.y % p.kv_heads, pair = batch * p.kv_heads + head;
  const int own_side = blockIdx.y / p.kv_heads;
  wait_for_previous_kernel();
  let_next_kernel_begin();
  int32_t* count = p.lengths + pair;
  const int stored = *count;
  require_room(int64_t{stored} + p.tokens, p.capacity + s.sinks);
  const Places places(stored, p.tokens, s.group, s.sinks);
  const int64_t first = places.first_open + static_cast<int64_t>(blockIdx.x) * s.group;
  if (first < places.full_end) {
    for (int side = kFew ? 0 : own_side; side <= (kFew ? 1 : own_side); ++side) {
      uint4 rows[kTokensPerLane];
      load_group<T, kLanes, kVector>(rows, p, s.full[side], places, first + kTokensPerLane * slot, s.group, side == 1,
                                     batch, head, lane);
      F::template quantize<T, kLanes>(s, shared, side, p, pair, first, rows, slot, lane);
      __syncthreads();  // shared memory is free again
    }
  }
  if (blockIdx.x != 0) return;
  __syncthreads();  // the old tail and the count have been read
  const int kept = min(p.tokens - places.taken, s.group), last = places.taken + kept;
  const int ratio = p.query.data ? p.heads / p.kv_heads : 0;
  const int rows = kFew ? (2 + ratio) * last : last;  // with kFew every token is a sink or kept
  for (int begin = 0; begin < rows; begin += slots) {
    const int row = min(begin + slot, rows - 1);
    FewRow job(row, head, kFew ? ratio : 0);
    if constexpr (!kFew) {
      job.side = own_side ? Side::kValue : Side::kKey;
      job.head = head;
      job.token = row < places.taken ? row : p.tokens - last + row;
    }
    const RowBits bits = job.load<T, kVector>(p, batch, lane);
    float v[kPerLane];
    transform_unless_value<T, kLanes>(v, bits, p, job.side == Side::kValue, lane);
    if (begin + slot >= rows || kPerLane * lane >= p.dim) continue;
    if (job.side == Side::kQuery) {
      store_query<T>(p, batch, job.head, job.token, lane, v);
    } else {
      const KvFullSide& full = s.full[job.side == Side::kValue];
      T* target = full_row<T>(full, places, pair, job.token, s.group, s.sinks, p.dim);
      reinterpret_cast<uint4*>(target)[lane] = pack<T>(v);
    }
  }
  if (kFew && threadIdx.x == 0) *count = stored + p.tokens;
}

template <typename F>
cudaError_t launch_append_groups(const KvNewTokens& p, const KvGroupedStorage& s, Dtype dtype, cudaStream_t stream) {
  const bool few = p.tokens <= kFewTokens;
  const cudaError_t error = for_row_shape(p, dtype, [&](auto type, auto lanes, auto vector) {
    using T = decltype(type);
    const int groups = std::max((p.tokens + s.group - 1) / s.group, 1), threads = s.group / kTokensPerLane * lanes;
    const dim3 grid(groups, few ? p.kv_heads : 2 * p.kv_heads, p.batch);
    const auto kernel = few ? append_groups_kernel<F, T, lanes, vector, true>
                            : append_groups_kernel<F, T, lanes, vector, false>;
    return launch_kernel_early(kernel, grid, threads, 0, stream, p, s);
  });
  return error != cudaSuccess || few ? error : launch_finish_chunk(p, dtype, 1, stream);
}

// Threads of a CTA by their warps.
template <int kLanes>
constexpr int kMaxWarps = 64 / kTokensPerLane * kLanes / 32;

}  // namespace hf_fastpath::kv
