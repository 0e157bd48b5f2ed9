// Decode attention: warps' results to a CTA's, CTAs' to the output.
//
// A result is a part: for each head the maximum of its scores, the sum of its weights and their sum of values, both
// relative to the maximum. Parts are added in a fixed order: a CTA's warps one after the other, then its CTAs: every
// 16th one after the other, and the 16 sums by halves, where a CTA that does not exist counts as nothing.
#pragma once

#include "../common/ptx_sm90.cuh"
#include "softmax.cuh"
#include "stage.cuh"

namespace hf_fastpath::attn {

// A warp's part, where its ring was. The pitch keeps columns 2t of the mma apart in the banks.
template <int kPadded>
struct WarpPart {
  static constexpr int kPitch = kPadded + 4;
  float out[kHeadsPerCta][kPitch];
};
// A CTA's.
template <int kPadded>
struct CtaPart {
  float4 statistics[kHeadsPerCta];  // maximum, sum
  float4 out[kHeadsPerCta][kPadded / 4];
};
constexpr int kStatisticsFloats = 4 * kHeadsPerCta;

template <typename F>
struct Shared {
  static constexpr int kWarps = F::Tuning::kWarps;
  static constexpr int kRingBytes = F::Tuning::kStages * F::kStageBytes;
  static_assert(kRingBytes >= sizeof(WarpPart<F::kPadded>) && kRingBytes % 16 == 0);
  using Query = SharedQuery<F::kPadded>;
  static constexpr int kBytes = kWarps * kRingBytes + sizeof(CtaPart<F::kPadded>) + kWarps * kHeadsPerCta * 8 +
                                (F::kHasFull ? 2 : 1) * sizeof(Query);

  static __device__ __forceinline__ unsigned char* ring(int warp) { return dynamic_shared() + warp * kRingBytes; }
  static __device__ __forceinline__ WarpPart<F::kPadded>* warp_part(int warp) {
    return reinterpret_cast<WarpPart<F::kPadded>*>(ring(warp));
  }
  static __device__ __forceinline__ CtaPart<F::kPadded>* part() {
    return reinterpret_cast<CtaPart<F::kPadded>*>(ring(kWarps));
  }
  // Maximum and sum of [warp][head].
  static __device__ __forceinline__ float2* statistics() { return reinterpret_cast<float2*>(part() + 1); }
  // As the format wants it, and as it is where the format has tokens in full precision.
  static __device__ __forceinline__ Query* query() {
    return reinterpret_cast<Query*>(statistics() + kWarps * kHeadsPerCta);
  }
  static __device__ __forceinline__ Query* raw_query() { return F::kHasFull ? query() + 1 : nullptr; }
};

// What a part counts for beside others, `largest` being the maximum of all.
__device__ __forceinline__ float part_factor(float max, float largest) {
  return max == kMinusInfinity ? 0.0f : exp2_fast(max - largest);
}

template <typename F>
__device__ __forceinline__ void share_warp_part(typename F::State& r, const F& format, int head_count, int warp,
                                                int lane) {
  const int g = lane / 4, t = lane % 4;
  const float unit = inverse_weight_unit(r.exponent);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const float sum = sum_over_g(r.sum[j]);
    const int head = 2 * t + j;
    if (g == 0) Shared<F>::statistics()[warp * kHeadsPerCta + head] = make_float2(r.max[j], sum);
#pragma unroll
    for (int block = 0; block < F::kBlocks; ++block) {
      const int width = format.block_width(block);
      float low = 0.0f;
      if constexpr (F::kMinima) low = sum_over_g(r.minima[block][j]);
      if (head >= head_count || 8 * g >= width) continue;
      float* row = &Shared<F>::warp_part(warp)->out[head][block * width + 8 * g];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        *reinterpret_cast<float2*>(row + 2 * i) =
            make_float2(r.out[block][i][j] * unit + low, r.out[block][i][j + 2] * unit + low);
      }
    }
  }
}

template <typename F>
__device__ __forceinline__ void add_warp_parts(int head_count, int dim) {
  constexpr int kWarps = Shared<F>::kWarps;
  const int quads = dim / 4;
  for (int i = threadIdx.x; i < head_count * quads; i += 32 * kWarps) {
    const int head = i / quads, quad = i % quads;
    float2 statistics[kWarps];
    float largest = kMinusInfinity;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      statistics[w] = Shared<F>::statistics()[w * kHeadsPerCta + head];
      largest = fmaxf(largest, statistics[w].x);
    }
    float4 out = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float factor = part_factor(statistics[w].x, largest);
      const float4 v = *reinterpret_cast<const float4*>(&Shared<F>::warp_part(w)->out[head][4 * quad]);
      out.x += v.x * factor, out.y += v.y * factor, out.z += v.z * factor, out.w += v.w * factor;
      sum += statistics[w].y * factor;
    }
    Shared<F>::part()->out[head][quad] = out;
    if (quad == 0) Shared<F>::part()->statistics[head] = make_float4(largest, sum, 0.0f, 0.0f);
  }
}

// Sums over the 16 lanes of half a warp, the same in all.
__device__ __forceinline__ float sum_of_16(float v) {
#pragma unroll
  for (int offset = 8; offset; offset /= 2) v += __shfl_xor_sync(kFullWarp, v, offset);
  return v;
}

// Adds the parts of all `splits` CTAs and stores the heads from `first_head` (of the whole batch) on. This CTA does every
// ctas-th of the quads of channels, from number `rank` on; lanes 0 .. 15 and 16 .. 31 of a warp take one each.
// statistics(split, head) and out(split, head, quad) read a part.
template <typename T, typename Statistics, typename Out>
__device__ __forceinline__ void add_cta_parts(const Params& p, int64_t first_head, int head_count, int splits, int rank,
                                              int ctas, int threads, Statistics statistics, Out out) {
  constexpr int kLanes = 16, kEach = kMaxSplits / kLanes;
  const int lane = threadIdx.x % kLanes, quads = p.a.dim / 4, all = head_count * quads;
  for (int first = rank; first < all; first += threads / kLanes * ctas) {
    const int number = first + static_cast<int>(threadIdx.x) / kLanes * ctas;
    const bool there = number < all;
    const int head = there ? number / quads : 0, quad = number % quads;
    float4 s[kEach], v[kEach];
    float largest = kMinusInfinity;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int split = lane + i * kLanes;
      s[i] = make_float4(kMinusInfinity, 0.0f, 0.0f, 0.0f), v[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (there && split < splits) s[i] = statistics(split, head), v[i] = out(split, head, quad);
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) largest = fmaxf(largest, s[i].x);
#pragma unroll
    for (int offset = kLanes / 2; offset; offset /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, offset));
    }
    float sink = kMinusInfinity;
    if (there && p.a.sinks) {
      sink = p.a.sinks[(first_head + head) % p.a.heads] * kLog2E;
      largest = fmaxf(largest, sink);
    }
    float sum = 0.0f, total[4] = {};
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const float factor = part_factor(s[i].x, largest);
      sum += s[i].y * factor;
      total[0] += v[i].x * factor, total[1] += v[i].y * factor;
      total[2] += v[i].z * factor, total[3] += v[i].w * factor;
    }
    sum = sum_of_16(sum) + part_factor(sink, largest);
#pragma unroll
    for (float& x : total) x = sum_of_16(x);
    if (!there || lane) continue;
    const float inverse = sum != 0.0f ? 1.0f / sum : 0.0f;
    const int64_t row = first_head + head;
    if (p.a.totals && quad == 0) p.a.totals[row] = make_float2(largest, inverse);
    T* to = static_cast<T*>(p.a.out) + row * p.a.dim + quad * 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = from_float<T>(total[i] * inverse);
  }
}

}  // namespace hf_fastpath::attn
