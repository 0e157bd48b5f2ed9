// How a tile of gates and ups (PairedSchedule) leaves the accumulators: as silu(gate) * up, of which warp w holds the
// gates and warp w + 4, lane by lane, the ups. What is rounded is what the product alone would store.
#pragma once

#include "../common/swiglu.cuh"
#include "sm90_store.cuh"

namespace hf_fastpath {

constexpr int kPairedWarps = kGemmWarps / 2, kPairedThreads = kGemmThreads / 2;

// How a warp stores SwiGLU of the fragments of one tile of 16 outputs. p.n: of y, half of the weight's.
template <typename T>
class SwigluStore {
 public:
  __device__ __forceinline__ SwigluStore(const GemmParams<T>& p, const Place& place, int warp, int lane)
      : target_(p, place.row_block * kPairedWarps + warp % kPairedWarps, lane) {}

  __device__ __forceinline__ void store(const uint2& gates, const uint2& ups, int first_token) const {
    target_.store_pairs(make_uint2(swiglu_pair<T>(gates.x, ups.x), swiglu_pair<T>(gates.y, ups.y)), first_token);
  }

 private:
  FragmentStore<T> target_;
};

// The biases of a thread's two outputs of the gate's or of up's rows.
template <typename T>
struct PairedBias {
  float lo = 0, hi = 0;

  __device__ __forceinline__ PairedBias(const GemmParams<T>& p, const Place& place, bool up, int warp, int lane) {
    const int column = (place.row_block * kPairedWarps + warp % kPairedWarps) * 16 + lane / 4;
    if (!p.bias || column >= p.n) return;  // n is a multiple of 16
    const T* const bias = p.bias + (up ? p.n : 0) + column;
    lo = to_float(bias[0]), hi = to_float(bias[8]);
  }
  // Adds the biases and rounds: of each output its two tokens.
  __device__ __forceinline__ uint2 round(const float (&sum)[4]) const {
    return make_uint2(pack_floats(sum[0] + lo, sum[1] + lo, T()), pack_floats(sum[2] + hi, sum[3] + hi, T()));
  }
};

// In registers: a conditional of two pairs as they are would be one of their addresses.
__device__ __forceinline__ uint2 choose(bool first, const uint2& a, const uint2& b) {
  return make_uint2(first ? a.x : b.x, first ? a.y : b.y);
}

// Where the warpgroups hand each other their sums: those of gates take the first half of the token tiles, those of ups
// the other one. `turn` has an arrival a warp, and two phases a tile: written, and read.
template <int kTokenTiles>
struct SwigluExchange {
  uint2 pairs[kTokenTiles][kPairedThreads];
  uint64_t turn;
};

template <typename T, int kTokenTiles>
__device__ __forceinline__ void store_swiglu(const float (&acc)[kTokenTiles][4], SwigluExchange<kTokenTiles>& exchange,
                                             const GemmParams<T>& p, const Place& place, int warp, int lane) {
  constexpr int kHalf = kTokenTiles / 2;
  const int thread = warp % kPairedWarps * 32 + lane;
  const bool up = warp >= kPairedWarps;
  const auto arrive = [&] {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&exchange.turn);
  };
  const PairedBias<T> bias(p, place, up, warp, lane);
  uint2 own[kHalf];
  mbarrier_wait(&exchange.turn, 1);  // what the tile before left there was read
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const uint2 first = bias.round(acc[i]), second = bias.round(acc[kHalf + i]);
    own[i] = choose(up, second, first);
    exchange.pairs[up ? i : kHalf + i][thread] = choose(up, first, second);
  }
  arrive();
  mbarrier_wait(&exchange.turn, 0);
  const SwigluStore<T> target(p, place, warp, lane);
#pragma unroll 1  // several exponentials at once would not fit into the registers beside the next tile's weights
  for (int i = 0; i < kHalf; ++i) {
    const int c = up ? kHalf + i : i, first_token = (place.token_block * kTokenTiles + c) * 8;
    if (first_token >= p.m) break;
    const uint2 other = exchange.pairs[c][thread];
    target.store(choose(up, other, own[0]), choose(up, own[0], other), first_token);
#pragma unroll
    for (int next = 1; next < kHalf; ++next) own[next - 1] = own[next];
  }
  arrive();
}

// As add_parts() of other tiles: each warpgroup of each CTA adds some of the token tiles, both gates and ups.
template <int kRanks, int kTokenTiles, typename T>
__device__ __forceinline__ void add_parts(const float4* parts, const Sm90Params<T, PairedSchedule>& params, int cta,
                                          int thread) {
  const PairedSchedule& s = params.schedule;
  const Place place = s.place(cta / s.splits);
  const GemmParams<T>& p = params.gemm;
  const int warp = thread / 32, lane = thread % 32;
  const PairedBias<T> gate_bias(p, place, false, warp, lane), up_bias(p, place, true, warp, lane);
  const SwigluStore<T> target(p, place, warp, lane);
  const int tiles = min(kTokenTiles, (p.m - place.token_block * kTokenTiles * 8 + 7) / 8);
  for (int c = 2 * (cta % s.splits) + thread / kPairedThreads; c < tiles; c += 2 * s.splits) {
    const float4* const own = parts + c * kGemmThreads + thread % kPairedThreads;
    Parts<kRanks> gates, ups;
    gates.load(own, s.splits);
    ups.load(own + kPairedThreads, s.splits);
    float gate[4], up[4];
    gates.add(gate, s.splits);
    ups.add(up, s.splits);
    target.store(gate_bias.round(gate), up_bias.round(up), (place.token_block * kTokenTiles + c) * 8);
  }
}

}  // namespace hf_fastpath
