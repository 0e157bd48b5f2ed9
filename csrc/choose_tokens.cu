// From scores to the next tokens: two kernels. The CTAs of the first take a part of a row each; the second, one CTA,
// takes the best of the parts, and does all the bookkeeping of a step.
//
// The largest score does not depend on the order in which scores are compared, so a row is divided as the GPU likes it.
#include <algorithm>

#include "choice.h"
#include "common/dtype.cuh"
#include "common/launch.cuh"
#include "common/reduce.cuh"

namespace hf_fastpath {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kChunk = 2048;  // scores of a CTA, at least
constexpr int kNoteWarps = 16;

// Ordered as torch.argmax orders: by score, NaN being the largest and both zeros alike, then the first index. Above 0.
__device__ __forceinline__ uint64_t rank_of(float score, int index) {
  const uint32_t bits = __float_as_uint(score + 0.0f);
  uint32_t order = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  if (score != score) order = 0xffffffffu;
  return static_cast<uint64_t>(order) << 32 | (0xffffffffu - static_cast<uint32_t>(index));
}
__device__ __forceinline__ int64_t index_of(uint64_t rank) {
  return static_cast<int64_t>(0xffffffffu - static_cast<uint32_t>(rank));
}
__device__ __forceinline__ uint64_t warp_max(uint64_t v) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) {
    const uint64_t other = __shfl_xor_sync(kFullWarp, v, offset);
    v = v > other ? v : other;
  }
  return v;
}

// kVectors: rows of scores, and of noise, start at multiples of 16 bytes and have whole vectors.
template <typename T, bool kVectors, bool kNoise>
__global__ void __launch_bounds__(kThreads) best_of_parts_kernel(const ChooseTokensArgs a) {
  constexpr int kPer = kVectors ? 16 / static_cast<int>(sizeof(T)) : 1;
  const int64_t row = blockIdx.y;
  const T* const scores = static_cast<const T*>(a.scores) + row * a.score_row_stride;
  const float* const noise = kNoise ? a.noise + row * a.vocabulary : nullptr;
  const int units = a.vocabulary / kPer, parts = gridDim.x, part = blockIdx.x;
  const int begin = static_cast<int>(static_cast<int64_t>(units) * part / parts);
  const int end = static_cast<int>(static_cast<int64_t>(units) * (part + 1) / parts);
  wait_for_previous_kernel();
  let_next_kernel_begin();
  uint64_t best = 0;
  const auto see = [&](float score, int index) {
    const uint64_t rank = rank_of(score, index);
    best = rank > best ? rank : best;
  };
#pragma unroll 4
  for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += kThreads) {
    if constexpr (kVectors) {
      const uint4 bits = *reinterpret_cast<const uint4*>(scores + i * kPer);
      const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
      if constexpr (kNoise) {
        const float4 of = *reinterpret_cast<const float4*>(noise + i * kPer);
        const float by[4] = {of.x, of.y, of.z, of.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) see(__uint_as_float(words[j]) / by[j], i * kPer + j);
      } else {
#pragma unroll
        for (int j = 0; j < kPer; ++j) {
          if constexpr (sizeof(T) == 4) {
            see(__uint_as_float(words[j]), i * kPer + j);
          } else {
            see(bits_to_float<T>(words[j / 2] >> (16 * (j % 2))), i * kPer + j);
          }
        }
      }
    } else {
      see(kNoise ? to_float(scores[i]) / noise[i] : to_float(scores[i]), i);
    }
  }
  __shared__ uint64_t of_warps[kWarps];
  best = warp_max(best);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = best;
  __syncthreads();
  if (threadIdx.x) return;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) best = of_warps[w] > best ? of_warps[w] : best;
  a.parts[row * parts + part] = best;
}

__device__ __forceinline__ bool is_among(int64_t token, const int64_t* tokens, int count) {
  for (int i = 0; i < count; ++i) {
    if (tokens[i] == token) return true;
  }
  return false;
}

// A warp takes a row of every kNoteWarps.
__global__ void __launch_bounds__(32 * kNoteWarps) note_tokens_kernel(const ChooseTokensArgs a, int parts) {
  __shared__ int has_unfinished[kNoteWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  wait_for_previous_kernel();
  let_next_kernel_begin();
  const int64_t count = *a.count;
  if (count < 0 || count >= a.capacity) __trap();
  int any_unfinished = 0;
  for (int64_t row = warp; row < a.rows; row += kNoteWarps) {
    uint64_t best = 0;
    for (int i = lane; i < parts; i += 32) {
      const uint64_t rank = a.parts[row * parts + i];
      best = rank > best ? rank : best;
    }
    best = warp_max(best);
    if (lane) continue;
    int64_t token = index_of(best);
    if (a.end) {
      const bool unfinished = a.unfinished[row] != 0;
      if (!unfinished) token = *a.pad;
      const int goes_on = unfinished && !is_among(token, a.end, a.end_count);
      a.unfinished[row] = goes_on;
      any_unfinished |= goes_on;
    }
    a.ids[row] = token;
    a.tokens[row * a.token_row_stride + count] = token;
    a.positions[row] += 1;
  }
  if (lane == 0) has_unfinished[warp] = any_unfinished;
  __syncthreads();  // everybody has read the count, too
  if (threadIdx.x) return;
  *a.count = count + 1;
  if (!a.end) return;
#pragma unroll
  for (int w = 0; w < kNoteWarps; ++w) any_unfinished |= has_unfinished[w];
  int64_t done = *a.done;
  if (!any_unfinished && (done >> 24 & 0xffffff) == 0) *a.done = done |= (count + 1) << 24;
  *static_cast<volatile int64_t*>(a.report) = done | (count + 1);
}

template <typename T, bool kNoise>
cudaError_t launch(const ChooseTokensArgs& a, int parts, cudaStream_t stream) {
  const auto whole = [](const void* begin, int64_t bytes) {
    return reinterpret_cast<uintptr_t>(begin) % 16 == 0 && bytes % 16 == 0;
  };
  const int64_t size = sizeof(T);
  const bool vectors =
      whole(a.scores, a.vocabulary * size) && whole(a.noise, 0) && (a.rows == 1 || a.score_row_stride * size % 16 == 0);
  const dim3 grid(parts, a.rows);
  const cudaError_t error = launch_kernel_early_if_possible(
      vectors ? best_of_parts_kernel<T, true, kNoise> : best_of_parts_kernel<T, false, kNoise>, grid, kThreads, stream,
      a);
  if (error != cudaSuccess) return error;
  return launch_kernel_early_if_possible(note_tokens_kernel, 1, 32 * kNoteWarps, stream, a, parts);
}

}  // namespace

int choose_tokens_parts(int rows, int vocabulary, int sm_count) {
  const int most = (vocabulary + kChunk - 1) / kChunk, wanted = (4 * sm_count + rows - 1) / rows;
  return std::max(1, std::min(most, wanted));
}

cudaError_t launch_choose_tokens(const ChooseTokensArgs& args, Dtype dtype, int sm_count, cudaStream_t stream) {
  if (args.noise && dtype != Dtype::kFloat32) return cudaErrorInvalidValue;
  const int parts = choose_tokens_parts(args.rows, args.vocabulary, sm_count);
  if (dtype == Dtype::kFloat16) return launch<__half, false>(args, parts, stream);
  if (dtype == Dtype::kBFloat16) return launch<__nv_bfloat16, false>(args, parts, stream);
  return args.noise ? launch<float, true>(args, parts, stream) : launch<float, false>(args, parts, stream);
}

}  // namespace hf_fastpath
