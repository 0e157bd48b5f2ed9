// What temperature, top-k, top-p and min-p leave of a row's logits. A CTA takes a row, which it reads five times or
// less, and finds what the filters keep; CTAs of a second kernel take parts of rows, and store the weights.
//
// A token is known by its key: the order of its scaled logit, then its index, so that no two are alike and the tokens
// that a filter keeps are those whose key is at least some threshold. Every token weighs something: 1 for top-k, its
// probability, relative to the largest, as an integer of 40 bits for top-p. Both filters keep a token if those with
// larger keys weigh less than a budget. So a histogram over the distance from the largest logit says between which bins
// the threshold is; the tokens there are put into a list in shared memory, and the threshold is searched for among
// them, 32 candidates at a time. If they are more than the list takes, the search goes over the whole row.
//
// All sums are of integers, so that they depend on no order. Where a probability is nearly the whole budget, torch's
// float32 cumulative sums, which on a GPU differ from run to run, may keep a token more or less.
#include <algorithm>

#include "choice.h"
#include "common/atomics.cuh"
#include "common/dtype.cuh"
#include "common/launch.cuh"
#include "common/memory.cuh"
#include "common/reduce.cuh"

namespace hf_fastpath {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kBins = 2 * kThreads;
constexpr int kListed = 4096;
constexpr float kBinsPerUnit = 64.0f;  // of natural logarithms, or more where logits are closer together
constexpr int kMassBits = 40, kBinBits = 13;
constexpr uint64_t kLargestKey = ~uint64_t{0};
constexpr int kStoreThreads = 256, kStored = 4;  // tokens of a thread at a time
static_assert((uint64_t{kMaxSamplingVocabulary} << kBinBits) < uint64_t{1} << 32, "a bin takes all of a row's masses");
static_assert(kWarps == 32, "a warp a candidate, and a lane a warp");

struct Memory {
  uint64_t keys[kListed], masses[kListed];
  uint64_t sums[2][kWarps];
  float extremes[2][kWarps];
  uint32_t bins[kBins];
  uint32_t flags[2][kWarps];
  uint32_t listed;
  int first_bin, last_bin;
};

// A row as the filters see it.
template <typename T, bool kVectors>
struct Row {
  const T* logits;
  float factor;  // 1 / temperature
  int count;

  static __device__ __forceinline__ float scaled(float logit, float factor) {
    return __fadd_rn(__fmul_rn(logit, factor), 0.0f);  // no -0, which would be another key than 0
  }

  // Calls see(scaled logit, index), in an order of the thread's own.
  template <typename See>
  __device__ __forceinline__ void for_each(const See& see) const {
    constexpr int kPer = kVectors ? 16 / static_cast<int>(sizeof(T)) : 1;
#pragma unroll 2
    for (int i = threadIdx.x; i < count / kPer; i += kThreads) {
      if constexpr (kVectors) {
        const uint4 bits = reinterpret_cast<const uint4*>(logits)[i];
        const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
        for (int j = 0; j < kPer; ++j) {
          float value;
          if constexpr (sizeof(T) == 4) {
            value = __uint_as_float(words[j]);
          } else {
            value = bits_to_float<T>(words[j / 2] >> (16 * (j % 2)));
          }
          see(scaled(value, factor), i * kPer + j);
        }
      } else {
        see(scaled(to_float(logits[i]), factor), i);
      }
    }
  }
};

__device__ __forceinline__ uint64_t key_of(float x, int index) {
  const uint32_t bits = __float_as_uint(x);
  const uint32_t order = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(order) << 32 | static_cast<uint32_t>(index);
}
__device__ __forceinline__ uint64_t mass_of(float weight) {
  return static_cast<uint64_t>(weight * static_cast<float>(uint64_t{1} << kMassBits));
}
__device__ __forceinline__ uint64_t warp_sum(uint64_t v) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) v += __shfl_xor_sync(kFullWarp, v, offset);
  return v;
}

// The histogram's bins: by distance from the largest logit.
struct Bins {
  float largest, per_unit, bits_of_one;  // the last: by how many powers of 2 a bin is wide

  __device__ __forceinline__ Bins(float largest, float range) : largest(largest) {
    constexpr float kLog2E = 1.4426950408889634f;
    per_unit = fmaxf(kBinsPerUnit, static_cast<float>(kBins - 2) / fmaxf(range, 1e-3f));
    bits_of_one = kLog2E / per_unit;
  }
  __device__ __forceinline__ int of(float x) const {
    return static_cast<int>(fminf((largest - x) * per_unit, static_cast<float>(kBins - 1)));
  }
  // By how many bits the masses of a bin are shortened, so that all of a row's tokens fit into it.
  __device__ __forceinline__ int shift(int bin) const {
    return max(kMassBits - kBinBits - static_cast<int>(static_cast<float>(bin) * bits_of_one), 0);
  }
};

template <typename T, bool kVectors>
struct Filter {
  const Row<T, kVectors>& row;
  Memory& memory;
  Bins bins;
  int turn = 0;         // of the buffers that are used in turns, so that a barrier each is enough
  bool listed = false;  // whether all tokens that are kept so far are in the list

  __device__ __forceinline__ float weight_of(float x) const { return expf(x - bins.largest); }

  // The sum over all threads, in each.
  __device__ __forceinline__ uint64_t sum(uint64_t v) {
    turn ^= 1;
    v = warp_sum(v);
    if (threadIdx.x % 32 == 0) memory.sums[turn][threadIdx.x / 32] = v;
    __syncthreads();
    return warp_sum(memory.sums[turn][threadIdx.x % 32]);
  }

  // The smallest key of which exceeds(key), what those above it weigh, is less than the budget; kWarps keys at a time
  // if `kByWarp`, where each warp asks for a key of its own, else all threads for one.
  template <bool kByWarp, typename Above>
  __device__ __forceinline__ uint64_t search(uint64_t low, uint64_t budget, const Above& above) {
    uint64_t high = kLargestKey;
    while (low < high) {
      if constexpr (kByWarp) {
        const uint64_t step = (high - low) / (kWarps + 1) + 1;
        const auto candidate = [&](int i) {
          const uint64_t ahead = step * (i + 1) - 1;
          return ahead < high - low ? low + ahead : high;
        };
        const int warp = threadIdx.x / 32;
        turn ^= 1;
        const bool enough = above(candidate(warp)) < budget;
        if (threadIdx.x % 32 == 0) memory.flags[turn][warp] = enough;
        __syncthreads();
        const int failed = kWarps - __popc(__ballot_sync(kFullWarp, memory.flags[turn][threadIdx.x % 32]));
        const uint64_t next_low = failed ? candidate(failed - 1) + 1 : low;
        if (failed < kWarps) high = candidate(failed);
        low = next_low;
      } else {
        const uint64_t middle = low + (high - low) / 2;
        if (above(middle) < budget) {
          high = middle;
        } else {
          low = middle + 1;
        }
      }
    }
    return low;
  }

  // What the listed tokens from some key on weigh: in each lane of a warp.
  template <bool kMasses>
  __device__ __forceinline__ uint64_t listed_from(uint64_t key) const {
    uint64_t total = 0;
    for (uint32_t i = threadIdx.x % 32; i < memory.listed; i += 32) {
      if (memory.keys[i] >= key) total += kMasses ? memory.masses[i] : 1;
    }
    return warp_sum(total);
  }

  // Fills the histogram with the tokens from `least` on, and gives their mass. The last bin holds what is left, and is
  // not counted.
  template <bool kMasses>
  __device__ __forceinline__ uint64_t fill_bins(uint64_t least) {
    for (int i = threadIdx.x; i < kBins; i += kThreads) memory.bins[i] = 0;
    __syncthreads();
    uint64_t total = 0;
    row.for_each([&](float x, int index) {
      if (key_of(x, index) < least) return;
      const int bin = bins.of(x);
      uint64_t mass = 0;
      if constexpr (kMasses) total += mass = mass_of(weight_of(x));
      if (bin < kBins - 1) atomicAdd(&memory.bins[bin], kMasses ? static_cast<uint32_t>(mass >> bins.shift(bin)) : 1u);
    });
    return sum(total);
  }

  // Between which bins the threshold is: memory.first_bin and last_bin.
  template <bool kMasses>
  __device__ __forceinline__ void find_bins(uint64_t budget) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint64_t of[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int bin = 2 * threadIdx.x + i;
      of[i] = static_cast<uint64_t>(memory.bins[bin]) << (kMasses ? bins.shift(bin) : 0);
    }
    uint64_t until = of[0] + of[1];
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const uint64_t other = __shfl_up_sync(kFullWarp, until, offset);
      if (lane >= offset) until += other;
    }
    turn ^= 1;
    if (lane == 31) memory.sums[turn][warp] = until;
    if (threadIdx.x == 0) memory.first_bin = memory.last_bin = kBins - 1;
    __syncthreads();
    until += warp_sum(lane < warp ? memory.sums[turn][lane] : uint64_t{0});
    // What was shortened to 12 bits and a little less may have been a bit larger.
    const auto most = [](uint64_t v) { return kMasses ? v + (v >> (kBinBits - 2)) + 1 : v; };
    uint64_t before = until - of[0] - of[1];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint64_t now = before + of[i];
      const bool is_first_thing = threadIdx.x == 0 && i == 0;
      if ((is_first_thing || most(before) < budget) && most(now) >= budget) memory.first_bin = 2 * threadIdx.x + i;
      if (before < budget && now >= budget) memory.last_bin = 2 * threadIdx.x + i;
      before = now;
    }
    __syncthreads();
  }

  // Lists the tokens from `least` on in some bins. Returns whether there was room for all; `before`: what those in
  // bins before weigh.
  template <bool kMasses>
  __device__ __forceinline__ bool list(uint64_t least, int first_bin, int last_bin, uint64_t& before) {
    __syncthreads();  // the list is not read any more
    if (threadIdx.x == 0) memory.listed = 0;
    __syncthreads();
    uint64_t weight_before = 0;
    bool full = false;
    row.for_each([&](float x, int index) {
      const uint64_t key = key_of(x, index);
      const int bin = bins.of(x);
      if (key < least || bin > last_bin) return;
      if (bin < first_bin) {
        weight_before += kMasses ? mass_of(weight_of(x)) : 1;
        return;
      }
      if (full) return;
      const uint32_t place = atomicAdd(&memory.listed, 1u);
      full = place >= kListed;
      if (full) return;
      memory.keys[place] = key;
      memory.masses[place] = mass_of(weight_of(x));
    });
    before = sum(weight_before);
    return memory.listed <= kListed;
  }

  // The threshold of a filter for the tokens from `least` on. budget(mass of all of them): what it keeps.
  template <bool kMasses, typename Budget>
  __device__ __forceinline__ uint64_t threshold(uint64_t least, const Budget& budget_of) {
    if (listed) {
      const uint64_t budget = budget_of(listed_from<true>(least));
      return search<true>(least, budget,
                          [&](uint64_t key) { return key == kLargestKey ? 0 : listed_from<kMasses>(key + 1); });
    }
    const uint64_t budget = budget_of(fill_bins<kMasses>(least));
    find_bins<kMasses>(budget);
    const int first = memory.first_bin, last = memory.last_bin;
    uint64_t before;
    listed = list<kMasses>(least, 0, last, before);
    if (listed || (first > 0 && list<kMasses>(least, first, last, before))) {
      return search<true>(least, budget, [&](uint64_t key) {
        return before + (key == kLargestKey ? 0 : listed_from<kMasses>(key + 1));
      });
    }
    return search<false>(least, budget, [&](uint64_t key) {
      uint64_t above = 0;
      row.for_each([&](float x, int index) {
        if (key_of(x, index) > key) above += kMasses ? mass_of(weight_of(x)) : 1;
      });
      return sum(above);
    });
  }
};

// The largest and the smallest finite value; the first is a NaN if there is one.
template <typename T, bool kVectors>
__device__ __forceinline__ float2 extremes_of(const Row<T, kVectors>& row, Memory& memory) {
  float largest = -INFINITY, smallest = INFINITY;
  row.for_each([&](float x, int) {
    largest = max_nan(largest, x);
    if (x > -INFINITY) smallest = fminf(smallest, x);
  });
  largest = warp_max_nan(largest);
  smallest = -warp_max_nan(-smallest);
  if (threadIdx.x % 32 == 0) {
    memory.extremes[0][threadIdx.x / 32] = largest;
    memory.extremes[1][threadIdx.x / 32] = smallest;
  }
  __syncthreads();
  return make_float2(warp_max_nan(memory.extremes[0][threadIdx.x % 32]),
                     -warp_max_nan(-memory.extremes[1][threadIdx.x % 32]));
}

template <typename T, bool kVectors>
__global__ void __launch_bounds__(kThreads) sampling_threshold_kernel(const SamplingWeightsArgs a) {
  Memory& memory = *reinterpret_cast<Memory*>(dynamic_shared());
  const int64_t number = blockIdx.x;
  const Row<T, kVectors> row = {static_cast<const T*>(a.logits) + number * a.row_stride, a.factor, a.vocabulary};
  wait_for_previous_kernel();
  let_next_kernel_begin();
  const float2 extremes = extremes_of(row, memory);
  const float range = extremes.x - extremes.y;
  // No weights without a NaN: where there is one, or an infinite logit, or no token at all.
  const bool ordinary = range < INFINITY && range > -INFINITY;
  uint64_t least = 0;
  if (ordinary) {
    Filter<T, kVectors> filter{row, memory, Bins(extremes.x, range)};
    if (a.top_k > 0 && a.top_k < a.vocabulary) {
      const uint64_t budget = a.top_k;
      least = filter.template threshold<false>(0, [&](uint64_t) { return budget; });
      least = least >> 32 << 32;  // with all that are equal; they are in one bin, so the list has them all or none
    }
    if (a.removed > 0.0) {
      // As transformers says it: a token is removed if its probability and all smaller ones are `removed` together, or
      // less; the largest stays.
      const double kept = 1.0 - a.removed;
      least = filter.template threshold<true>(least, [&](uint64_t mass) {
        return static_cast<uint64_t>(fmax(ceil(static_cast<double>(mass) * kept), 1.0));
      });
    }
  }
  if (threadIdx.x == 0) a.thresholds[number] = {least, ordinary ? extremes.x : NAN, 0};
}

template <typename T, bool kVectors>
__global__ void __launch_bounds__(kStoreThreads) sampling_weights_kernel(const SamplingWeightsArgs a) {
  const int64_t number = blockIdx.y;
  const T* const logits = static_cast<const T*>(a.logits) + number * a.row_stride;
  float* const out = a.out + number * a.vocabulary;
  const int first = kStored * static_cast<int>(blockIdx.x * kStoreThreads + threadIdx.x);
  wait_for_previous_kernel();
  let_next_kernel_begin();
  if (first >= a.vocabulary) return;
  const SamplingThreshold threshold = a.thresholds[number];
  const auto weight = [&](float logit, int index) {
    const float x = Row<T, kVectors>::scaled(logit, a.factor), w = expf(x - threshold.largest);
    return key_of(x, index) >= threshold.key && !(w < a.min_p) ? w : 0.0f;
  };
  if constexpr (kVectors) {
    T of[kStored];
    if constexpr (sizeof(T) == 4) {
      *reinterpret_cast<uint4*>(of) = *reinterpret_cast<const uint4*>(logits + first);
    } else {
      *reinterpret_cast<uint2*>(of) = *reinterpret_cast<const uint2*>(logits + first);
    }
    *reinterpret_cast<float4*>(out + first) =
        make_float4(weight(to_float(of[0]), first), weight(to_float(of[1]), first + 1),
                    weight(to_float(of[2]), first + 2), weight(to_float(of[3]), first + 3));
  } else {
    for (int i = first; i < min(first + kStored, a.vocabulary); ++i) out[i] = weight(to_float(logits[i]), i);
  }
}

template <typename T, bool kVectors>
cudaError_t launch_both(const SamplingWeightsArgs& a, cudaStream_t stream) {
  const auto find = sampling_threshold_kernel<T, kVectors>;
  const cudaError_t error = has_early_launch()
                                ? launch_kernel_early(find, a.rows, kThreads, sizeof(Memory), stream, a)
                                : launch_kernel_with_shared(find, a.rows, kThreads, sizeof(Memory), stream, a);
  if (error != cudaSuccess) return error;
  const int each = kStoreThreads * kStored;
  const dim3 grid((a.vocabulary + each - 1) / each, a.rows);
  return launch_kernel_early_if_possible(sampling_weights_kernel<T, kVectors>, grid, kStoreThreads, stream, a);
}

template <typename T>
cudaError_t launch(const SamplingWeightsArgs& a, cudaStream_t stream) {
  const int64_t size = sizeof(T);
  const bool vectors = aligned_to(a.logits, 16) && aligned_to(a.out, 16) && a.vocabulary * size % 16 == 0 &&
                       (a.rows == 1 || a.row_stride * size % 16 == 0);
  return vectors ? launch_both<T, true>(a, stream) : launch_both<T, false>(a, stream);
}

}  // namespace

cudaError_t launch_sampling_weights(const SamplingWeightsArgs& args, Dtype dtype, cudaStream_t stream) {
  if (args.vocabulary > kMaxSamplingVocabulary) return cudaErrorInvalidValue;
  if (dtype == Dtype::kFloat16) return launch<__half>(args, stream);
  if (dtype == Dtype::kBFloat16) return launch<__nv_bfloat16>(args, stream);
  return launch<float>(args, stream);
}

}  // namespace hf_fastpath
