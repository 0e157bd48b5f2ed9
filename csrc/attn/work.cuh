// Decode attention: how the tokens of a row are divided among CTAs and warps.
//
// An item is what a warp takes at a time: a tile of codes, or up to 16 tokens of those that a format keeps in full
// precision. A row's items are dealt to the warps of `splits` CTAs in turn. That follows from the row's length alone,
// so that its bits depend neither on its neighbours in a batch nor on the capacity of the cache.
#pragma once

#include "../kernels.h"

namespace hf_fastpath::attn {

constexpr int kHeadsPerCta = 8;  // query heads: the columns of an mma
constexpr int kMaxSplits = 64;
constexpr int kFullTokens = 16;  // of an item in full precision

// How a format is run: kWarps a CTA, each with a ring of kStages tiles; kCtasPerSm limits the registers. A row gets a
// CTA for every kShort items a warp, up to 12, and more, up to kMost, when there are kDepth items a warp: every CTA
// costs about as much as an item a warp, and in a batch what one row does not take is there for the others.
template <int kWarps_, int kStages_, int kShort_, int kDepth_, int kMost_, int kCtasPerSm_>
struct Tuning {
  static constexpr int kWarps = kWarps_, kStages = kStages_, kShort = kShort_, kDepth = kDepth_, kMost = kMost_,
                       kCtasPerSm = kCtasPerSm_;
  static_assert(kMost <= kMaxSplits);
};

struct Params {
  AttnDecodeArgs a;
  int splits;  // CTAs of a row and KV head, at least those that any length up to the capacity asks for
  int groups;  // of up to 8 query heads that read a KV head
};

// The CTA's place: which heads of which row.
struct Place {
  int kv_head, group, head_count;
  // pair: row and KV head; first_head: of the whole batch; parts: the first one
  int64_t batch, pair, first_head, parts;

  __device__ __forceinline__ explicit Place(const Params& p) {
    const int ratio = p.a.heads / p.a.kv_heads;
    group = static_cast<int>(blockIdx.y) % p.groups;
    kv_head = static_cast<int>(blockIdx.y) / p.groups;
    batch = blockIdx.z;
    pair = batch * p.a.kv_heads + kv_head;
    head_count = min(kHeadsPerCta, ratio - group * kHeadsPerCta);
    first_head = batch * p.a.heads + kv_head * ratio + group * kHeadsPerCta;
    parts = (batch * gridDim.y + blockIdx.y) * p.splits;
  }
};

template <typename Tuning>
__host__ __device__ inline int splits_of(int items) {
  const auto splits = [items](int each, int most) {
    const int wanted = (items + each - 1) / each;
    return wanted < most ? wanted : most;
  };
  const int few = splits(Tuning::kWarps * Tuning::kShort, 12);
  const int many = splits(Tuning::kWarps * Tuning::kDepth, Tuning::kMost);
  const int most = few > many ? few : many;
  return most > 1 ? most : 1;
}

// What a row of some length consists of.
struct Work {
  int length, visible_from;  // tokens before `visible_from` are outside the window
  int front, coded, tail;    // tokens in front in full precision, as codes, at the end in full precision
  int first_tile, tiles;     // of codes, those outside the window left out
  int front_items, tail_items;
  int splits;

  template <typename F>
  static __device__ __forceinline__ Work of(int length, const AttnDecodeArgs& a) {
    Work w;
    w.length = length = min(length, a.capacity);
    w.visible_from = a.window > 0 ? max(length - a.window, 0) : 0;
    w.front = F::kHasFull ? min(length, a.front_tokens) : 0;
    w.coded = length - w.front;
    if constexpr (F::kHasFull) w.coded = w.coded / a.group_tokens * a.group_tokens;
    w.tail = length - w.front - w.coded;
    w.first_tile = max(w.visible_from - w.front, 0) / F::kTile;
    w.tiles = max((w.coded + F::kTile - 1) / F::kTile - w.first_tile, 0);
    w.front_items = w.visible_from < w.front ? (w.front + kFullTokens - 1) / kFullTokens : 0;
    w.tail_items = (w.tail + kFullTokens - 1) / kFullTokens;
    w.splits = splits_of<typename F::Tuning>(w.tiles + w.front_items + w.tail_items);
    return w;
  }
};

// The most CTAs that a row and KV head can ask for.
template <typename F>
int max_splits(const AttnDecodeArgs& a) {
  const auto items = [](int tokens, int of) { return (tokens + of - 1) / of; };
  int most = items(a.capacity, F::kTile);
  if (F::kHasFull) most += items(a.group_tokens, kFullTokens) + items(a.front_tokens, kFullTokens);
  return splits_of<typename F::Tuning>(most);
}

}  // namespace hf_fastpath::attn
