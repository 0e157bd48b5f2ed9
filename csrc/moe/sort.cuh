// The rows of many that go to each expert, side by side: what comes before and after the products of
// moe_grouped_sm90.cu.
//
// A pair is a row of x and one of its experts, numbered row * top_k + k; sorted, pairs are ordered by expert, those of
// an expert by number.
#pragma once

#include "../common/dtype.cuh"
#include "../common/memory.cuh"
#include "../common/ptx.cuh"

namespace hf_fastpath::moe {

constexpr int kSortWarps = 8;
constexpr int kThreads = 256;  // of each kernel here

struct Sorting {
  const int64_t* experts;
  int pairs, expert_count;
  int* first;  // (expert_count + 1,): where each expert's pairs begin
  int* order;  // (pairs,): the pair in each place
  int* place;  // (pairs,): the place of each pair
};

// A CTA an expert; each warp has a run of pairs. An expert that there is not ends the kernel with an error.
__global__ void __launch_bounds__(kThreads) sort_kernel(const Sorting s) {
  __shared__ int lower_of[kSortWarps], own_of[kSortWarps];
  const int expert = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int run = (s.pairs + 32 * kSortWarps - 1) / (32 * kSortWarps) * 32, begin = run * warp;
  const int end = min(begin + run, s.pairs);
  wait_for_previous_kernel();
  let_next_kernel_begin();
  int lower = 0, own = 0;
  for (int i = begin + lane; i < end; i += 32) {
    const int64_t its = s.experts[i];
    if (its < 0 || its >= s.expert_count) __trap();
    lower += its < expert;
    own += its == expert;
  }
#pragma unroll
  for (int offset = 16; offset; offset /= 2) {
    lower += __shfl_xor_sync(0xffffffffu, lower, offset);
    own += __shfl_xor_sync(0xffffffffu, own, offset);
  }
  if (lane == 0) lower_of[warp] = lower, own_of[warp] = own;
  __syncthreads();
  int first = 0, next = 0;
  for (int w = 0; w < kSortWarps; ++w) {
    first += lower_of[w];
    next += w < warp ? own_of[w] : 0;
  }
  next += first;
  if (threadIdx.x == 0) {
    s.first[expert] = first;
    if (expert == 0) s.first[s.expert_count] = s.pairs;
  }
  for (int at = begin; at < end; at += 32) {
    const int i = at + lane;
    const bool mine = i < end && s.experts[i] == expert;
    const unsigned flags = __ballot_sync(0xffffffffu, mine);
    if (mine) {
      const int place = next + __popc(flags & ((1u << lane) - 1));
      s.order[place] = i;
      s.place[i] = place;
    }
    next += __popc(flags);
  }
}

// Rows of x in the order of the sorted pairs; a warp a pair, 16 bytes a lane.
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const uint4* x, const int* order, uint4* sorted, int pairs, int top_k, int row_units) {
  const int place = blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
  wait_for_previous_kernel();
  let_next_kernel_begin();
  if (place >= pairs) return;
  const uint4* const source = x + static_cast<int64_t>(order[place] / top_k) * row_units;
  uint4* const target = sorted + static_cast<int64_t>(place) * row_units;
  for (int i = threadIdx.x % 32; i < row_units; i += 32) target[i] = source[i];
}

// y = the sum of a row's products, each times its share, in the order of its experts, and of the residual where there
// is one; a thread takes four columns.
template <typename T>
__global__ void __launch_bounds__(kThreads) combine_kernel(const float4* products, const int* place, const T* shares,
                                                           const T* residual, T* y, int rows, int top_k, int hidden) {
  const int quads = hidden / 4;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  wait_for_previous_kernel();
  let_next_kernel_begin();
  if (i >= static_cast<int64_t>(rows) * quads) return;
  const int64_t row = i / quads, quad = i % quads;
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  for (int k = 0; k < top_k; ++k) {
    const int64_t pair = row * top_k + k;
    const float4 product = products[place[pair] * static_cast<int64_t>(quads) + quad];
    const float share = to_float(shares[pair]);
    sum.x += product.x * share, sum.y += product.y * share, sum.z += product.z * share, sum.w += product.w * share;
  }
  if (residual) {
    const uint2 more = reinterpret_cast<const uint2*>(residual)[i];
    sum.x += bits_to_float<T>(more.x), sum.y += bits_to_float<T>(more.x >> 16);
    sum.z += bits_to_float<T>(more.y), sum.w += bits_to_float<T>(more.y >> 16);
  }
  const uint2 result = make_uint2(pack_floats(sum.x, sum.y, T()), pack_floats(sum.z, sum.w, T()));
  reinterpret_cast<uint2*>(y)[i] = result;
}

}  // namespace hf_fastpath::moe
