// Appends to the caches that quantize tokens in groups, each when it is full, and keep the others in full precision:
// the first few (sinks), and those of the group that is not full yet (the tail, where token t is entry t % group,
// tokens being numbered from behind the sinks). hf_fastpath/ops/_groups.py says the same in Python. A format F has:
//   Shared<kLanes>         what quantizing a group needs of shared memory
//   quantize<T, kLanes>()  stores a group. A lane has 8 tokens of 8 channels, as 16-bit values.
//   kThreadsPerSm          that there are to be registers for
#pragma once

#include "append_tokens.cuh"

namespace hf_fastpath::kv {

constexpr int kTokensPerLane = 8;

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

// A group in shared memory. A lane has 8 tokens of 8 channels, and no lane touches what is another's.
template <int kLanes>
struct GroupRows {
  uint4 rows[64][kLanes];
};

// A lane's part of it, token by token.
template <int kLanes>
struct LaneRows {
  const uint4* first;
  __device__ __forceinline__ const uint4& operator[](int i) const { return first[i * kLanes]; }
};

// A lane's part of a group, its tokens being `first` and the next seven: of the tail, or new ones; keys transformed.
template <typename T, int kLanes, bool kVector>
__device__ __forceinline__ void load_group(GroupRows<kLanes>& group, const KvNewTokens& p, const KvGroupedStorage& s,
                                           const Places& places, int64_t first, bool is_value, int64_t batch,
                                           int64_t head, int slot, int lane) {
  const KvRows& source = is_value ? p.value : p.key;
  const T* tail = static_cast<const T*>(s.full[is_value].tail) + (batch * p.kv_heads + head) * s.group * p.dim;
  const bool exists = kPerLane * lane < p.dim;
#pragma unroll
  for (int i = 0; i < kTokensPerLane; ++i) {
    const int64_t token = first + i, number = token - places.behind + places.taken;
    uint4& target = group.rows[kTokensPerLane * slot + i][lane];
    if (token < places.behind) {
      cp_async16(&target, tail + (token % s.group) * p.dim + (exists ? kPerLane * lane : 0), exists);
    } else if constexpr (kVector) {
      cp_async16(&target, row_begin<T>(source, batch, head, number) + (exists ? kPerLane * lane : 0), exists);
    } else {
      target = load_row<T, false>(source, batch, head, number, lane, p.dim);
    }
  }
  cp_async_commit();
  cp_async_wait<0>();
  if (is_value || !(p.k_norm || p.rotary_dim || p.rotation)) return;
#pragma unroll 1
  for (int i = 0; i < kTokensPerLane; ++i) {
    const int64_t token = first + i;
    const bool is_new = token >= places.behind;
    RowBits bits;
    bits.x = group.rows[kTokensPerLane * slot + i][lane];
    load_transform<T, kVector>(bits, p, p.k_norm, batch, is_new ? token - places.behind + places.taken : 0, lane);
    const uint4 transformed = transform<T, kLanes>(bits, p, p.k_norm != nullptr, lane);
    if (is_new) group.rows[kTokensPerLane * slot + i][lane] = transformed;
  }
}

// A CTA takes group `blockIdx.x` of those that new tokens fill. few: of a KV head, keys and values, with all its new
// tokens and the query heads that read it. Else of keys (the first half of the grid's y) or values alone.
template <typename F, typename T, int kLanes, bool kVector>
__global__ void __launch_bounds__(8 * kLanes, F::kThreadsPerSm / (8 * kLanes))
    append_groups_kernel(const __grid_constant__ KvNewTokens p, const __grid_constant__ KvGroupedStorage s, bool few) {
  __shared__ GroupRows<kLanes> group;
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
    for (int side = few ? 0 : own_side; side <= (few ? 1 : own_side); ++side) {
      load_group<T, kLanes, kVector>(group, p, s, places, first + kTokensPerLane * slot, side == 1, batch, head, slot,
                                     lane);
      const LaneRows<kLanes> rows{&group.rows[kTokensPerLane * slot][lane]};
      F::template quantize<T, kLanes>(s, shared, side, p, pair, first, rows, slot, lane);
      __syncthreads();  // shared memory is free again
    }
  }
  if (blockIdx.x != 0) return;
  __syncthreads();  // the old tail and the count have been read
  const int kept = min(p.tokens - places.taken, s.group), last = places.taken + kept;
  const int ratio = p.query.data ? p.heads / p.kv_heads : 0;
  const int rows = few ? (2 + ratio) * last : last;  // with few every token is a sink or kept
  for (int begin = 0; begin < rows; begin += slots) {
    const int row = min(begin + slot, rows - 1);
    FewRow job(row, head, few ? ratio : 0);
    if (!few) {
      job.side = own_side ? Side::kValue : Side::kKey;
      job.head = head;
      job.token = row < places.taken ? row : p.tokens - last + row;
    }
    const RowBits bits = job.load<T, kVector>(p, batch, lane);
    const uint4 transformed = transform<T, kLanes>(bits, p, p.k_norm != nullptr, lane);
    const uint4 x = job.side == Side::kValue ? bits.x : transformed;
    if (begin + slot >= rows || kPerLane * lane >= p.dim) continue;
    if (job.side == Side::kQuery) {
      store_query(p, batch, job.head, job.token, lane, x);
    } else {
      const KvFullSide& full = s.full[job.side == Side::kValue];
      T* target = full_row<T>(full, places, pair, job.token, s.group, s.sinks, p.dim);
      reinterpret_cast<uint4*>(target)[lane] = x;
    }
  }
  if (few && threadIdx.x == 0) *count = stored + p.tokens;
}

template <typename F>
cudaError_t launch_append_groups(const KvNewTokens& p, const KvGroupedStorage& s, Dtype dtype, cudaStream_t stream) {
  const bool few = p.tokens <= kFewTokens;
  const cudaError_t error = for_row_shape(p, dtype, [&](auto type, auto lanes, auto vector) {
    using T = decltype(type);
    const int groups = std::max((p.tokens + s.group - 1) / s.group, 1), threads = s.group / kTokensPerLane * lanes;
    const dim3 grid(groups, few ? p.kv_heads : 2 * p.kv_heads, p.batch);
    return launch_kernel_early_if_possible(append_groups_kernel<F, T, lanes, vector>, grid, threads, stream, p, s, few);
  });
  return error != cudaSuccess || few ? error : launch_finish_chunk(p, dtype, 1, stream);
}

// Threads of a CTA by their warps.
template <int kLanes>
constexpr int kMaxWarps = 64 / kTokensPerLane * kLanes / 32;

}  // namespace hf_fastpath::kv
