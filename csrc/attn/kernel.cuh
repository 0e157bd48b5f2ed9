// Decode attention: one new token a row over a KV cache. "Flash-Decoding" (Dao et al., 2023): a row's tokens are
// divided among CTAs, which keep maximum and sum of the scores of their part, and the parts are added.
//
// A CTA has one KV head of a row for up to 8 of its query heads, and a part of the tokens (work.cuh). Both products run
// on tensor cores: S = K q^T with tokens as rows, O^T = V^T p^T with channels as rows, query heads as the 8 columns of
// both, so that the heads of a group share every byte read. Where a lane's columns of a fragment come from is free as
// long as both operands agree, so codes are read 16 bytes a lane and never rearranged. Every warp has a ring of tiles
// in shared memory of its own, which it fills and empties without meeting the other warps.
//
// The CTAs' parts go through the scratch. Where they are few, the CTA that is the last to be done adds them: a second
// kernel would cost a launch, clusters were no faster than that, and much slower in batches: CTAs that wait for each
// other take room. Many are added by a kernel of their own, from compute capability 9.0 on there when they are done.
//
// A format F (format_*.cuh) has T, the tile's shape, Query, State, and: copy() a tile to shared memory, prefetch() it
// to the L2, scores(), add_values().
#pragma once

#include "../common/launch.cuh"
#include "combine_apart.cuh"
#include "format_16bit.cuh"

namespace hf_fastpath::attn {

// Whether a token, or the token in a slot, may be attended, from the row's mask.
template <typename F>
struct Mask {
  const uint8_t* row;
  const int* positions;
  int64_t columns;
  int slots;

  __device__ __forceinline__ Mask(const AttnDecodeArgs& a, const Place& place)
      : row(a.mask ? a.mask + place.batch * a.mask_row_stride : nullptr),
        positions(F::kSlots ? a.positions + place.pair * a.capacity : nullptr),
        columns(a.mask_columns),
        slots(a.capacity) {}
  __device__ __forceinline__ bool at(int token) const {
    if (!row) return true;
    if constexpr (F::kSlots) {
      if (token >= slots) return false;
      token = positions[token];
    }
    return token < columns && row[token];
  }
};

// A bit for each of the 32 tokens from `first` on that is before `stop` and attended. `visible`: Mask::at() of the
// lane's token, which is read early.
template <typename F>
__device__ __forceinline__ uint32_t present_tokens(int first, int stop, const Work& w, const Mask<F>& mask,
                                                   bool visible, int lane) {
  if (!mask.row && first >= w.visible_from && first + 32 <= stop) return 0xffffffffu;
  const int token = first + lane;
  return __ballot_sync(kFullWarp, token >= w.visible_from && token < stop && visible);
}

// The shape of an item in full precision, as of a format's tile.
struct FullTile {
  static constexpr int kTiles = 1;
  static constexpr uint32_t kAllPresent = 0xffff;
  static __device__ __forceinline__ int token(int, int g, int h) { return g + 8 * h; }
};

// An item in full precision: `there` tokens, the first of them number `first` of the row.
template <typename T>
struct FullItem {
  const T *keys, *values;
  int first, there;

  __device__ __forceinline__ FullItem(const Params& p, const Place& place, const Work& w, int number) {
    const bool front = number < w.front_items;
    const int entry = (front ? number : number - w.front_items) * kFullTokens;
    const int64_t at = (place.pair * (front ? p.a.front_tokens : p.a.group_tokens) + entry) * p.a.dim;
    keys = static_cast<const T*>(front ? p.a.keys.front : p.a.keys.tail) + at;
    values = static_cast<const T*>(front ? p.a.values.front : p.a.values.tail) + at;
    first = front ? entry : w.front + w.coded + entry;
    there = min((front ? w.front : w.length) - first, kFullTokens);
  }

  // The first one of the warp that is `number` of `step`: items are numbered behind the tiles.
  static __device__ __forceinline__ int first_of(const Work& w, int number, int step) {
    return (number - w.tiles % step + step) % step;
  }
};

// Attends to an item in full precision, read straight from global memory.
template <typename F>
__device__ __forceinline__ void attend_full(typename F::State& r, const F& format, const Params& p, const Work& w,
                                            const Mask<F>& mask, const FullItem<typename F::T>& item, float to_score,
                                            int lane) {
  using T = typename F::T;
  Query16<T, F::kPadded> query;
  query.load(*Shared<F>::raw_query(), to_score, lane);
  const auto read = [&](const T* from, int row, int channel, int end) {
    if (row >= item.there || channel >= end) return make_uint4(0, 0, 0, 0);
    return load_8x16bit<true>(from + row * p.a.dim + channel);
  };
  float scores[1][4];
  multiply_keys16(scores[0], query, [&](int row, int chunk) { return read(item.keys, row, 8 * chunk, p.a.dim); }, lane);
  const uint32_t present =
      present_tokens(item.first, item.first + item.there, w, mask, mask.at(item.first + lane), lane) & 0xffff;
  finish_scores<FullTile>(scores, query.factor, p.a.softcap, present, lane / 4);
  float rescale[2];
  update_softmax(r, scores, rescale);
  const float unit = rescale_output(r, rescale, kOneExponent);
  multiply_values16<T>(
      r.out, weight_fragment<T>(scores[0], unit, unit),
      [&](int row, int block, int g) {
        const int width = format.block_width(block);
        return read(item.values, row, block * width + 8 * g, 8 * g < width ? p.a.dim : 0);
      },
      lane);
}

// For the weights of each slot, which are known when all scores are.
template <typename F>
__device__ __forceinline__ void store_scores(const float (&scores)[F::kTiles][4], const Params& p, const Place& place,
                                             int first, int stop, int lane) {
#pragma unroll
  for (int i = 0; i < 4 * F::kTiles; ++i) {
    const int slot = first + F::token(i / 4, lane / 4, i % 4 / 2), head = lane % 4 * 2 + i % 2;
    if (slot < stop && head < place.head_count) {
      p.a.slot_scores[(place.first_head + head) * p.a.capacity + slot] = scores[i / 4][i % 4];
    }
  }
}

// Asks for the first tiles of a warp, of which the last `missing` tokens are not stored yet.
template <typename F>
__device__ __forceinline__ void fill_ring(const F& format, const Work& w, int missing, int warp, int lane) {
  const int split = blockIdx.x;
#pragma unroll
  for (int s = 0; s < F::Tuning::kStages - 1; ++s) {
    const int i = (s * F::Tuning::kWarps + warp) * w.splits + split;
    if (split < w.splits && i < w.tiles) {
      format.copy(Shared<F>::ring(warp) + s * F::kStageBytes, w.first_tile + i, w.coded - missing, lane);
    }
    cp_async_commit();
  }
}

// Whether the tiles that a warp asked for when the row was as `before` are those that it needs.
template <typename F>
__device__ __forceinline__ bool is_ring_right(const Work& before, const Work& w, int missing, int warp) {
  if (before.length == w.length) return true;
  if (before.splits != w.splits || before.first_tile != w.first_tile) return false;
  bool right = true;
#pragma unroll
  for (int s = 0; s < F::Tuning::kStages - 1; ++s) {
    const int i = (s * F::Tuning::kWarps + warp) * w.splits + static_cast<int>(blockIdx.x);
    const bool whole = (w.first_tile + i + 1) * F::kTile <= min(before.coded, w.coded) - missing;
    right &= whole || i >= max(before.tiles, w.tiles);
  }
  return right;
}

// Attends to a warp's items. Its ring is filled. `heads`: the CTA's first query head; complete(stage, i): puts into
// tile i, which is there, what is missing of it.
template <typename F, typename Complete>
__device__ __forceinline__ void attend(typename F::State& r, const F& format, const Params& p, const Place& place,
                                       const Work& w, const typename F::T* heads, int missing, const Complete& complete,
                                       int warp, int lane) {
  constexpr int kStages = F::Tuning::kStages;
  unsigned char* const ring = Shared<F>::ring(warp);
  const int split = blockIdx.x, step = w.splits * F::Tuning::kWarps;
  const int number = warp * w.splits + split;
  const Mask<F> mask(p.a, place);
  // Natural units over softcap, or log2 units.
  const float to_score = p.a.softcap > 0.0f ? p.a.scaling / p.a.softcap : p.a.scaling * kLog2E;
  store_query<typename F::Order>(*Shared<F>::query(), Shared<F>::raw_query(), heads, place.head_count, p.a.dim, warp,
                                 F::Tuning::kWarps, lane);
  __syncthreads();
  typename F::Query query;
  query.load(*Shared<F>::query(), to_score, lane);
  if constexpr (F::kHasFull) {
    using Item = FullItem<typename F::T>;
    for (int i = Item::first_of(w, number, step); i < w.front_items + w.tail_items; i += step) {
      attend_full(r, format, p, w, mask, Item(p, place, w, i), to_score, lane);
    }
  }
  const auto first_token = [&](int i) { return w.front + (w.first_tile + i) * F::kTile; };
  bool visible = number < w.tiles && mask.at(first_token(number) + lane);
  int stage = 0;
  for (int i = number; i < w.tiles; i += step) {
    cp_async_wait<kStages - 2>();
    __syncwarp();  // all lanes' copies are there, and all have read the stage that is filled now
    const int ahead = i + (kStages - 1) * step;
    unsigned char* const now = ring + stage * F::kStageBytes;
    if (ahead < w.tiles) {
      format.copy(ring + (stage ? stage - 1 : kStages - 1) * F::kStageBytes, w.first_tile + ahead, w.coded - missing,
                  lane);
    }
    cp_async_commit();
    stage = stage == kStages - 1 ? 0 : stage + 1;
    complete(now, i);
    const uint32_t present = present_tokens(first_token(i), w.front + w.coded, w, mask, visible, lane) & F::kAllPresent;
    if (i + step < w.tiles) visible = mask.at(first_token(i + step) + lane);
    float scores[F::kTiles][4], rescale[2];
    format.scores(scores, now, query, present, lane);
    finish_scores<F>(scores, query.factor, p.a.softcap, present, lane / 4);
    if constexpr (F::kSlots) store_scores<F>(scores, p, place, first_token(i), w.coded, lane);
    update_softmax(r, scores, rescale);
    format.add_values(r, scores, rescale, now, present, lane);
  }
  cp_async_wait<0>();
  __syncwarp();
}

// The first items of a warp on their way to the L2, but for a tile that is not whole.
template <typename F>
__device__ __forceinline__ void prefetch(const F& format, const Params& p, const Place& place, const Work& w, int warp,
                                         int lane) {
  if (static_cast<int>(blockIdx.x) >= w.splits) return;
  const int number = warp * w.splits + static_cast<int>(blockIdx.x), step = w.splits * F::Tuning::kWarps;
#pragma unroll
  for (int s = 0; s < F::Tuning::kStages - 1; ++s) {
    const int tile = w.first_tile + number + s * step;
    if ((tile + 1) * F::kTile <= w.coded) format.prefetch(tile, lane);
  }
  if constexpr (F::kHasFull) {
    using Item = FullItem<typename F::T>;
    const int i = Item::first_of(w, number, step);
    if (i >= w.front_items + w.tail_items) return;
    const Item item(p, place, w, i);
    for (int line = 64 * lane; line < item.there * p.a.dim; line += 64 * 32) {
      prefetch_l2(item.keys + line);
      prefetch_l2(item.values + line);
    }
  }
}

// Adds the parts of a CTA's warps: the result when it is the row's only one, else the CTA's part, for others to add.
template <typename F>
__device__ __forceinline__ void share_part(typename F::State& state, const F& format, const Params& p,
                                           const Place& place, const Work& w, int warp, int lane) {
  share_warp_part<F>(state, format, place.head_count, warp, lane);
  __syncthreads();
  auto* const parts = static_cast<CtaPart<F::kPadded>*>(static_cast<void*>(p.a.scratch)) + place.parts;
  add_warp_parts<F>(p, place.first_head, place.head_count, w.splits == 1 ? nullptr : parts + blockIdx.x);
}

// Adds the parts of all CTAs of a row and KV head, those of every group of query heads. All threads of a CTA do it.
template <typename F>
__device__ __forceinline__ void add_parts_of_pair(const Params& p, const Place& place, const Work& w) {
  const auto* const parts = static_cast<CtaPart<F::kPadded>*>(static_cast<void*>(p.a.scratch));
  const int ratio = p.a.heads / p.a.kv_heads;
  for (int group = 0; group < p.groups; ++group) {
    if (group) __syncthreads();  // all have read the statistics of the group before
    const int head = group * kHeadsPerCta;
    add_cta_parts<F>(p, place.pair * ratio + head, min(kHeadsPerCta, ratio - head),
                     parts + place.parts + (group - place.group) * p.splits, w.splits);
  }
}

// The length is read twice: before the kernel before this one is done, when it may still be that without the token
// which that one appends, and after. What is asked for by the first is checked against the second, so that the memory
// is at work before the second is there.
template <typename F>
__global__ void __launch_bounds__(32 * F::Tuning::kWarps, F::Tuning::kCtasPerSm) attn_decode_kernel(const Params p) {
  const int warp = __shfl_sync(kFullWarp, threadIdx.x / 32, 0), lane = lane_number(), split = blockIdx.x;
  const Place place(p);
  const F format(p.a, place.pair, lane);
  const int* const length = p.a.lengths + place.pair * p.a.length_stride;
  const Work before = Work::of<F>(load_early(length), p.a);
  prefetch(format, p, place, before, warp, lane);
  wait_for_previous_kernel();
  let_next_kernel_begin();
  const int now = load_now(length);
  fill_ring(format, before, 0, warp, lane);
  const Work w = Work::of<F>(now, p.a);
  if (!is_ring_right<F>(before, w, 0, warp)) {
    cp_async_wait<0>();
    fill_ring(format, w, 0, warp, lane);
  }
  if (split >= w.splits) {
    cp_async_wait<0>();
    return;
  }
  typename F::State state;
  attend(
      state, format, p, place, w, static_cast<const typename F::T*>(p.a.query) + place.first_head * p.a.dim, 0,
      [](unsigned char*, int) {}, warp, lane);
  share_part(state, format, p, place, w, warp, lane);
  if (w.splits == 1 || p.splits > kPartsAtOnce) return;
  if (is_last_cta<F>(p.a.tickets + place.pair, w.splits * p.groups)) add_parts_of_pair<F>(p, place, w);
}

// Whether the current GPU has programmatic dependent launch, and the kernels were compiled for it.
template <typename F>
bool has_sm90_code() {
  return has_early_launch() && ptx_version_of(attn_decode_kernel<F>) >= 90;
}

template <typename F>
Params make_params(const AttnDecodeArgs& a) {
  Params p = {};
  p.a = a;
  p.splits = max_splits<F>(a);
  p.groups = (a.heads / a.kv_heads + kHeadsPerCta - 1) / kHeadsPerCta;
  return p;
}

template <typename F>
int64_t scratch_floats(const AttnDecodeArgs& a) {
  const Params p = make_params<F>(a);
  if (p.splits == 1) return 0;
  return int64_t{a.batch} * a.kv_heads * p.groups * p.splits * (sizeof(CtaPart<F::kPadded>) / sizeof(float));
}

template <typename F>
cudaError_t launch(const AttnDecodeArgs& a, cudaStream_t stream) {
  const Params p = make_params<F>(a);
  const dim3 grid(p.splits, a.kv_heads * p.groups, a.batch);
  constexpr int kThreads = 32 * F::Tuning::kWarps, kBytes = Shared<F>::kBytes;
  const bool early = has_sm90_code<F>();
  const cudaError_t error = early ? launch_kernel_early(attn_decode_kernel<F>, grid, kThreads, kBytes, stream, p)
                                  : launch_kernel_with_shared(attn_decode_kernel<F>, grid, kThreads, kBytes, stream, p);
  if (error != cudaSuccess || p.splits <= kPartsAtOnce) return error;
  const int quads = std::min(a.heads / a.kv_heads, kHeadsPerCta) * a.dim / 4;
  const dim3 combine_grid((quads + kQuadsPerCombineCta - 1) / kQuadsPerCombineCta, grid.y, grid.z);
  if (early) return launch_kernel_early(attn_combine_kernel<F>, combine_grid, kCombineThreads, 0, stream, p);
  return launch_kernel(attn_combine_kernel<F>, combine_grid, kCombineThreads, stream, p);
}

// launch() of the format Of<T, padded head dimension, whether that is the head dimension>::Format.
template <template <typename, int, bool> typename Of, typename T>
cudaError_t launch_for_dim(const AttnDecodeArgs& a, cudaStream_t stream) {
  if (a.dim == 64) return launch<typename Of<T, 64, true>::Format>(a, stream);
  if (a.dim == 128) return launch<typename Of<T, 128, true>::Format>(a, stream);
  if (a.dim < 128) return launch<typename Of<T, 128, false>::Format>(a, stream);
  return launch<typename Of<T, 256, false>::Format>(a, stream);
}
template <template <typename, int, bool> typename Of>
cudaError_t launch_for(const AttnDecodeArgs& a, Dtype dtype, cudaStream_t stream) {
  if (dtype == Dtype::kFloat16) return launch_for_dim<Of, __half>(a, stream);
  return launch_for_dim<Of, __nv_bfloat16>(a, stream);
}
// The same for every dtype; and whether the parts are so few that a CTA adds them.
template <template <typename, int, bool> typename Of>
bool has_few_parts_for(const AttnDecodeArgs& a) {
  if (a.dim == 64) return max_splits<typename Of<__half, 64, true>::Format>(a) <= kPartsAtOnce;
  if (a.dim <= 128) return max_splits<typename Of<__half, 128, true>::Format>(a) <= kPartsAtOnce;
  return max_splits<typename Of<__half, 256, false>::Format>(a) <= kPartsAtOnce;
}
template <template <typename, int, bool> typename Of>
int64_t scratch_floats_for(const AttnDecodeArgs& a) {
  if (a.dim == 64) return scratch_floats<typename Of<__half, 64, true>::Format>(a);
  if (a.dim <= 128) return scratch_floats<typename Of<__half, 128, true>::Format>(a);
  return scratch_floats<typename Of<__half, 256, false>::Format>(a);
}

}  // namespace hf_fastpath::attn
