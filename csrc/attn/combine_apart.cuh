// Decode attention of long rows: the parts of many CTAs, which one of them would take long to add, by a kernel of their
// own. Bits are those of add_cta_parts().
#pragma once

#include "../common/launch.cuh"
#include "combine.cuh"

namespace hf_fastpath::attn {

// A warp does kCombineQuads neighbouring quads of channels; of the lanes of a quad each adds every kSums-th part.
constexpr int kCombineQuads = 32 / kSums, kCombineThreads = 128;
constexpr int kQuadsPerCombineCta = kCombineQuads * kCombineThreads / 32;

// Over the lanes of a quad, the same in all.
template <typename Op>
__device__ __forceinline__ float over_quad(float v, Op op) {
#pragma unroll
  for (int offset = kCombineQuads; offset < 32; offset *= 2) v = op(v, __shfl_xor_sync(kFullWarp, v, offset));
  return v;
}

template <typename F>
__device__ __forceinline__ void add_parts_by_lanes(const Params& p, int64_t first_head, int head_count,
                                                   const CtaPart<F::kPadded>* parts, int splits) {
  constexpr int kEach = kMaxSplits / kSums;
  const int lane = threadIdx.x % 32, quads = F::quads(p.a);
  const int number =
      static_cast<int>(blockIdx.x * (kCombineThreads / 32) + threadIdx.x / 32) * kCombineQuads + lane % kCombineQuads;
  const bool there = number < head_count * quads;
  const int head = there ? number / quads : 0, quad = there ? number % quads : 0;
  float2 s[kEach];
  float4 v[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (kSums * i >= splits) break;
    const int split = lane / kCombineQuads + kSums * i;
    s[i] = make_float2(kMinusInfinity, 0.0f), v[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (split < splits) s[i] = parts[split].statistics[head], v[i] = parts[split].out[head][quad];
  }
  const float sink = sink_of(p, first_head + head);
  float largest = sink;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (kSums * i >= splits) break;
    largest = fmaxf(largest, s[i].x);
  }
  largest = over_quad(largest, [](float a, float b) { return fmaxf(a, b); });
  float sum = 0.0f, out[4] = {};
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (kSums * i >= splits) break;
    const float factor = part_factor(s[i].x, largest);
    sum += s[i].y * factor;
    out[0] += v[i].x * factor, out[1] += v[i].y * factor, out[2] += v[i].z * factor, out[3] += v[i].w * factor;
  }
  const auto add = [](float a, float b) { return a + b; };
  sum = over_quad(sum, add) + part_factor(sink, largest);
#pragma unroll
  for (float& x : out) x = over_quad(x, add);
  if (there && lane < kCombineQuads) store_result<typename F::T>(p, first_head + head, quad, largest, sum, out);
}

// kQuadsPerCombineCta quads a CTA, with attn_decode_kernel's grid but for its x. The lengths are what they were for
// that one, which let this kernel begin when the one before it was done.
template <typename F>
__global__ void __launch_bounds__(kCombineThreads) attn_combine_kernel(const Params p) {
  const Place place(p);
  const Work w = Work::of<F>(load_now(p.a.lengths + place.pair * p.a.length_stride), p.a);
  wait_for_previous_kernel();
  let_next_kernel_begin();
  if (w.splits == 1) return;  // there are no parts
  const auto* const parts = static_cast<CtaPart<F::kPadded>*>(static_cast<void*>(p.a.scratch));
  add_parts_by_lanes<F>(p, place.first_head, place.head_count, parts + place.parts, w.splits);
}

}  // namespace hf_fastpath::attn
