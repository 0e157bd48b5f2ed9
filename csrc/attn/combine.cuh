// Decode attention: warps' results to a CTA's, CTAs' to the output.
//
// A result is a part: for each head the maximum of its scores, the sum of its weights and their sum of values, both
// relative to the maximum. Parts are added in a fixed order, whoever adds them: a CTA's warps one after the other, then
// the CTAs: every 4th one after the other, and the 4 sums by halves.
#pragma once

#include "softmax.cuh"
#include "stage.cuh"

namespace hf_fastpath::attn {

// A warp's part, where its ring was. The pitch keeps columns 2t of the mma apart in the banks.
template <int kPadded>
struct WarpPart {
  static constexpr int kPitch = kPadded + 4;
  float out[kHeadsPerCta][kPitch];
};
// A CTA's, in the scratch.
template <int kPadded>
struct CtaPart {
  float2 statistics[kHeadsPerCta];  // maximum, sum
  float4 out[kHeadsPerCta][kPadded / 4];
};

template <typename F>
struct Shared {
  static constexpr int kWarps = F::Tuning::kWarps;
  static constexpr int kRingBytes = F::Tuning::kStages * F::kStageBytes;
  static_assert(kRingBytes >= sizeof(WarpPart<F::kPadded>) && kRingBytes % 16 == 0);
  using Query = SharedQuery<F::kPadded>;
  static constexpr int kBytes =
      kWarps * kRingBytes + kWarps * kHeadsPerCta * sizeof(float2) + (F::kHasFull ? 2 : 1) * sizeof(Query);

  static __device__ __forceinline__ unsigned char* ring(int warp) { return dynamic_shared() + warp * kRingBytes; }
  static __device__ __forceinline__ WarpPart<F::kPadded>* warp_part(int warp) {
    return reinterpret_cast<WarpPart<F::kPadded>*>(ring(warp));
  }
  // Maximum and sum of [warp][head].
  static __device__ __forceinline__ float2* statistics() { return reinterpret_cast<float2*>(ring(kWarps)); }
  // As the format wants it, and as it is where the format has tokens in full precision.
  static __device__ __forceinline__ Query* query() {
    return reinterpret_cast<Query*>(statistics() + kWarps * kHeadsPerCta);
  }
  static __device__ __forceinline__ Query* raw_query() { return F::kHasFull ? query() + 1 : nullptr; }

  // When the warps' parts are added: the CTA's ticket, and the statistics of the parts of all CTAs, [head][split].
  using CtaStatistics = float2[kMaxSplits];
  static_assert(kWarps * kRingBytes >= kHeadsPerCta * sizeof(CtaStatistics));
  static __device__ __forceinline__ uint32_t* ticket() { return reinterpret_cast<uint32_t*>(statistics()); }
  static __device__ __forceinline__ CtaStatistics* cta_statistics() {
    return reinterpret_cast<CtaStatistics*>(ring(0));
  }
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

// Stores what the heads from `first_head` (of the whole batch) on come to, `out` being a quad of channels.
template <typename T>
__device__ __forceinline__ void store_result(const Params& p, int64_t row, int quad, float largest, float sum,
                                             const float (&out)[4]) {
  const float inverse = sum != 0.0f ? 1.0f / sum : 0.0f;
  if (p.a.totals && quad == 0) p.a.totals[row] = make_float2(largest, inverse);
  T* to = static_cast<T*>(p.a.out) + row * p.a.dim + quad * 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = from_float<T>(out[i] * inverse);
}
// A head's sink in log2 units.
__device__ __forceinline__ float sink_of(const Params& p, int64_t row) {
  return p.a.sinks ? p.a.sinks[row % p.a.heads] * kLog2E : kMinusInfinity;
}

// Adds the warps' parts: the result when the row has but one CTA, else the CTA's part. `part` is its place.
template <typename F>
__device__ __forceinline__ void add_warp_parts(const Params& p, int64_t first_head, int head_count,
                                               CtaPart<F::kPadded>* part) {
  constexpr int kWarps = Shared<F>::kWarps;
  const int quads = F::quads(p.a);
  for (int i = threadIdx.x; i < head_count * quads; i += 32 * kWarps) {
    const int head = i / quads, quad = i % quads;
    float2 statistics[kWarps];
    float largest = kMinusInfinity;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      statistics[w] = Shared<F>::statistics()[w * kHeadsPerCta + head];
      largest = fmaxf(largest, statistics[w].x);
    }
    const float sink = part ? kMinusInfinity : sink_of(p, first_head + head);
    largest = fmaxf(largest, sink);
    float out[4] = {}, sum = part_factor(sink, largest);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float factor = part_factor(statistics[w].x, largest);
      const float4 v = *reinterpret_cast<const float4*>(&Shared<F>::warp_part(w)->out[head][4 * quad]);
      out[0] += v.x * factor, out[1] += v.y * factor, out[2] += v.z * factor, out[3] += v.w * factor;
      sum += statistics[w].y * factor;
    }
    if (part) {
      part->out[head][quad] = make_float4(out[0], out[1], out[2], out[3]);
      if (quad == 0) part->statistics[head] = make_float2(largest, sum);
    } else {
      store_result<typename F::T>(p, first_head + head, quad, largest, sum, out);
    }
  }
}

// Whether this CTA is the last of `ctas` that store the parts of a row and KV head. All of its threads call it when
// they have stored theirs, and then see those of the others.
template <typename F>
__device__ __forceinline__ bool is_last_cta(uint32_t* counter, int ctas) {
  const uint32_t last = static_cast<uint32_t>(ctas - 1);
  __syncthreads();
  if (threadIdx.x == 0) *Shared<F>::ticket() = draw_ticket(counter, last);
  __syncthreads();
  return *Shared<F>::ticket() == last;
}

constexpr int kSums = 4;          // of every 4th part
constexpr int kPartsAtOnce = 12;  // that a thread reads, a multiple of kSums

// A thread's quad of channels of parts `first` and on.
template <int kPadded>
__device__ __forceinline__ void load_parts(float4 (&v)[kPartsAtOnce], const CtaPart<kPadded>* parts, int head, int quad,
                                           int first, int splits) {
#pragma unroll
  for (int i = 0; i < kPartsAtOnce; ++i) {
    if (first + i < splits) v[i] = load_now(&parts[first + i].out[head][quad]);
  }
}

// Adds the parts of all `splits` CTAs and stores the heads from `first_head` (of the whole batch) on. The first values
// are asked for together with the statistics, without which nothing can be added.
template <typename F>
__device__ __forceinline__ void add_cta_parts(const Params& p, int64_t first_head, int head_count,
                                              const CtaPart<F::kPadded>* parts, int splits) {
  constexpr int kThreads = 32 * Shared<F>::kWarps;
  const int quads = F::quads(p.a), there = head_count * quads;
  auto* const statistics = Shared<F>::cta_statistics();
  int number = threadIdx.x;
  float4 v[kPartsAtOnce];
  bool loaded = number < there;
  if (loaded) load_parts(v, parts, number / quads, number % quads, 0, splits);
  for (int i = threadIdx.x; i < kHeadsPerCta * splits; i += kThreads) {
    const int head = i % kHeadsPerCta, split = i / kHeadsPerCta;
    if (head < head_count) statistics[head][split] = load_now(&parts[split].statistics[head]);
  }
  __syncthreads();
  for (; number < there; number += kThreads) {
    const int head = number / quads, quad = number % quads;
    const float sink = sink_of(p, first_head + head);
    float largest = sink;
    for (int split = 0; split < splits; ++split) largest = fmaxf(largest, statistics[head][split].x);
    float sum[kSums] = {}, out[4][kSums] = {};
    for (int first = 0; first < splits; first += kPartsAtOnce) {
      if (!loaded) load_parts(v, parts, head, quad, first, splits);
      loaded = false;
#pragma unroll
      for (int i = 0; i < kPartsAtOnce; ++i) {
        if (first + i >= splits) break;
        const float2 s = statistics[head][first + i];
        const float factor = part_factor(s.x, largest);
        sum[i % kSums] += s.y * factor;
        out[0][i % kSums] += v[i].x * factor, out[1][i % kSums] += v[i].y * factor;
        out[2][i % kSums] += v[i].z * factor, out[3][i % kSums] += v[i].w * factor;
      }
    }
    const auto total = [](const float (&x)[kSums]) { return (x[0] + x[1]) + (x[2] + x[3]); };
    store_result<typename F::T>(p, first_head + head, quad, largest, total(sum) + part_factor(sink, largest),
                                {total(out[0]), total(out[1]), total(out[2]), total(out[3])});
  }
}

}  // namespace hf_fastpath::attn
