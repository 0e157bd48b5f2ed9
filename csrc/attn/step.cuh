// Decode attention of a token that is not stored yet: each CTA normalizes, turns and rotates the queries that it has,
// and the one that has the last tile does so with the key, stores key and value as the cache keeps them, and puts them
// into the tile. It is append_tokens.cuh's appending and kernel.cuh's attention, with the bits of both, in one kernel.
//
// The row's length is what everybody goes by, so the CTA that draws the last ticket changes it: all have read it then,
// those without work included.
#pragma once

#include "../common/atomics.cuh"
#include "../kv/in_order.cuh"
#include "kernel.cuh"

namespace hf_fastpath::attn {

// What comes of the new rows: queries as attention wants them, D channels each, and of key and value what the lanes
// store of them. F: the format of the tiles, A: of what is appended.
template <typename F, typename A>
struct NewRows {
  static constexpr int kLanes = F::kPadded / kv::kPerLane;
  uint4 query[kHeadsPerCta * kLanes];
  typename A::Row stored[2 * kLanes];  // key, value

  static __device__ __forceinline__ NewRows* of_cta() {
    static_assert(Shared<F>::kBytes % 16 == 0);
    return reinterpret_cast<NewRows*>(dynamic_shared() + Shared<F>::kBytes);
  }
};

// A row that a group of lanes transforms: one of the CTA's queries, the key, or the value; and what a lane reads of it.
template <typename T>
struct NewRow {
  kv::Side side;
  int number;                     // of the query, 0 the CTA's first; of the side
  const T *x, *norm, *cos, *sin;  // nullptr: nothing there

  __device__ __forceinline__ NewRow(int row, const KvNewTokens& n, const Place& place, int lane) {
    using kv::Side;
    const int queries = place.head_count, channel = kv::kPerLane * lane;
    side = row < queries ? Side::kQuery : row == queries ? Side::kKey : Side::kValue;
    number = row < queries ? row : row - queries;
    const KvRows& rows = side == Side::kKey ? n.key : side == Side::kValue ? n.value : n.query;
    const int64_t head = side == Side::kQuery ? place.first_head - place.batch * n.heads + number : place.kv_head;
    const void* weight = side == Side::kQuery ? n.q_norm : n.k_norm;
    const bool there = channel < n.dim, turned = channel < n.rotary_dim;
    x = there ? kv::row_begin<T>(rows, place.batch, head, 0) + channel : nullptr;
    norm = there && weight ? static_cast<const T*>(weight) + channel : nullptr;
    cos = turned ? static_cast<const T*>(n.cos.data) + place.batch * n.cos.stride_batch + channel : nullptr;
    sin = turned ? static_cast<const T*>(n.sin.data) + place.batch * n.sin.stride_batch + channel : nullptr;
  }

  __device__ __forceinline__ kv::RowBits load() const {
    const auto read = [](const T* from) { return from ? kv::load_8<true>(from) : make_uint4(0, 0, 0, 0); };
    return {read(x), read(norm), read(cos), read(sin)};
  }
};

// Transforms the new rows, the first of which a group of lanes has loaded; key and value if the CTA stores them.
template <typename F, typename A>
__device__ __forceinline__ void transform_rows(NewRows<F, A>& rows, kv::RowBits bits, const KvNewTokens& n,
                                               const Place& place, bool stores) {
  using T = typename F::T;
  constexpr int kLanes = NewRows<F, A>::kLanes, kSlots = 32 * F::Tuning::kWarps / kLanes;
  const int slot = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, queries = place.head_count;
  const int count = queries + (stores ? 2 : 0);
  for (int first = 0; first < count; first += kSlots) {
    const NewRow<T> row(min(first + slot, queries + 1), n, place, lane);
    if (first) bits = row.load();
    const uint4 transformed = kv::transform<T, kLanes>(bits, n, n.k_norm != nullptr, lane);
    const uint4 x = row.side == kv::Side::kValue ? bits.x : transformed;
    typename A::Row stored;
    if (stores) stored = A::template quantize<T, kLanes>(x);
    if (first + slot >= count) continue;
    if (row.side != kv::Side::kQuery) {
      rows.stored[row.number * kLanes + lane] = stored;
    } else if (kv::kPerLane * lane < n.dim) {
      rows.query[row.number * (n.dim / kv::kPerLane) + lane] = x;
    }
  }
}

// Puts key and value into a tile, whose row `row` they are, and into the cache.
template <typename F, typename A>
__device__ __forceinline__ void store_rows(unsigned char* stage, int row, const NewRows<F, A>& rows,
                                           const KvNewTokens& n, const typename A::Storage& s, int64_t entry,
                                           int lane) {
  constexpr int kLanes = NewRows<F, A>::kLanes;
#pragma unroll
  for (int i = lane; i < 2 * kLanes; i += 32) {
    const int side = i / kLanes, of_row = i % kLanes;
    const typename A::Row& stored = rows.stored[i];
    F::put(stage, side, row, of_row, stored);
    if (kv::kPerLane * of_row < n.dim) {
      A::store(s, side ? kv::Side::kValue : kv::Side::kKey, entry, n.dim, of_row, stored);
    }
  }
  __syncwarp();
}

template <typename F, typename A>
__global__ void __launch_bounds__(32 * F::Tuning::kWarps, F::Tuning::kCtasPerSm)
    attn_step_kernel(const __grid_constant__ Params p, const __grid_constant__ KvNewTokens n,
                     const __grid_constant__ typename A::Storage s) {
  static_assert(!F::kHasFull && !F::kSlots);
  using Rows = NewRows<F, A>;
  using T = typename F::T;
  const int warp = __shfl_sync(kFullWarp, threadIdx.x / 32, 0), lane = lane_number(), split = blockIdx.x;
  const Place place(p);
  const F format(p.a, place.pair, lane);
  const int* const length = p.a.lengths + place.pair;
  const Work before = Work::of<F>(load_early(length) + 1, p.a);
  prefetch(format, p, place, before, warp, lane);
  const int slot = threadIdx.x / Rows::kLanes;
  const NewRow<T> row(min(slot, place.head_count + 1), n, place, threadIdx.x % Rows::kLanes);
  wait_for_previous_kernel();
  let_next_kernel_begin();
  const int stored = load_now(length);
  const kv::RowBits bits = row.load();
  fill_ring(format, before, 1, warp, lane);
  const Work w = Work::of<F>(stored + 1, p.a);
  if (!is_ring_right<F>(before, w, 1, warp)) {
    cp_async_wait<0>();
    fill_ring(format, w, 1, warp, lane);
  }
  if (split < w.splits) {
    Rows& rows = *Rows::of_cta();
    kv::require_room(int64_t{stored} + 1, p.a.capacity);
    transform_rows(rows, bits, n, place, (w.tiles - 1) % w.splits == split);
    __syncthreads();
    const auto complete = [&](unsigned char* stage, int tile) {
      if (tile == w.tiles - 1) {
        store_rows<F, A>(stage, stored % F::kTile, rows, n, s, place.pair * p.a.capacity + stored, lane);
      }
    };
    typename F::State state;
    attend(state, format, p, place, w, reinterpret_cast<const T*>(rows.query), 1, complete, warp, lane);
    share_part(state, format, p, place, w, warp, lane);
  } else {
    cp_async_wait<0>();
  }
  if (p.splits > 1 && !is_last_cta<F>(p.a.tickets + place.pair, p.splits)) return;
  if (w.splits > 1) add_parts_of_pair<F>(p, place, w);
  if (threadIdx.x == 0) n.lengths[place.pair] = stored + 1;
}

// Whether the kernel takes such rows, if they have few parts: whole vectors, a CTA for each KV head, and few rows. With
// many the memory is kept busy by one kernel after the other, and what each CTA has to do besides costs more (64 rows
// of 768 tokens on an H200: 59 us, and 48 of two kernels).
constexpr int kStepRows = 16;
inline bool step_fits(const AttnDecodeArgs& a, const KvNewTokens& n) {
  return n.tokens == 1 && a.batch <= kStepRows && a.heads / a.kv_heads <= kHeadsPerCta && kv::can_vectorize(n);
}

template <typename F, typename A>
cudaError_t launch_step(const AttnDecodeArgs& a, const KvNewTokens& n, const typename A::Storage& s,
                        cudaStream_t stream) {
  const Params p = make_params<F>(a);
  const dim3 grid(p.splits, a.kv_heads, a.batch);
  constexpr int kThreads = 32 * F::Tuning::kWarps, kBytes = Shared<F>::kBytes + sizeof(NewRows<F, A>);
  const auto kernel = attn_step_kernel<F, A>;
  if (has_sm90_code<F>()) return launch_kernel_early(kernel, grid, kThreads, kBytes, stream, p, n, s);
  return launch_kernel_with_shared(kernel, grid, kThreads, kBytes, stream, p, n, s);
}

// launch_step() of the format Of<T, padded head dimension, whether that is the head dimension>::Format.
template <template <typename, int, bool> typename Of, typename A, typename T>
cudaError_t launch_step_for_dim(const AttnDecodeArgs& a, const KvNewTokens& n, const typename A::Storage& s,
                                cudaStream_t stream) {
  if (a.dim == 64) return launch_step<typename Of<T, 64, true>::Format, A>(a, n, s, stream);
  if (a.dim == 128) return launch_step<typename Of<T, 128, true>::Format, A>(a, n, s, stream);
  if (a.dim < 128) return launch_step<typename Of<T, 128, false>::Format, A>(a, n, s, stream);
  return launch_step<typename Of<T, 256, false>::Format, A>(a, n, s, stream);
}
template <template <typename, int, bool> typename Of, typename A>
cudaError_t launch_step_for(const AttnDecodeArgs& a, const KvNewTokens& n, const typename A::Storage& s, Dtype dtype,
                            cudaStream_t stream) {
  if (dtype == Dtype::kFloat16) return launch_step_for_dim<Of, A, __half>(a, n, s, stream);
  return launch_step_for_dim<Of, A, __nv_bfloat16>(a, n, s, stream);
}

}  // namespace hf_fastpath::attn
