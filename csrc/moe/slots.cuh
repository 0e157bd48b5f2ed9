// Which rows of x each expert has to compute, found by every CTA for itself: a launch of its own would take longer.
//
// A pair is a row of x and one of its experts, numbered row * top_k + k. A slot is an expert with some of the pairs
// that chose it, at most eight, as many as a tile of the tensor core has columns; slots are ordered by expert, the
// pairs of a slot by number. No result depends on the order: a pair's sums are its own.
#pragma once

#include "../common/ptx.cuh"

namespace hf_fastpath::moe {

constexpr int kMaxPairs = 256;  // of a launch: a thread has one
constexpr int kSlotPairs = 8;

struct Slots {
  int count;
  int expert[kMaxPairs];
  int begin[kMaxPairs + 1];  // in `pairs`
  int pairs[kMaxPairs];
  int rows[kMaxPairs];  // what the pair reads: pair / pairs_of_row

  __device__ __forceinline__ int size(int slot) const { return begin[slot + 1] - begin[slot]; }
};

// What slots are made from.
struct Choices {
  const int64_t* experts;
  int rows, top_k, expert_count;
};

// What is needed only while slots are made.
struct SlotScratch {
  int expert[kMaxPairs];
  int ordered[kMaxPairs];  // 2 * expert, plus 1 where a slot starts
  unsigned starts[kMaxPairs / 32];
};

// The experts of a row are all different, so that one row's pairs are slots as they stand.
__device__ __forceinline__ void slots_of_one_row(Slots& slots, int expert, int pairs, int pairs_of_row) {
  const int i = threadIdx.x;
  if (i < pairs) slots.expert[i] = expert, slots.pairs[i] = i, slots.rows[i] = pairs_of_row == 1 ? i : 0;
  if (i <= pairs) slots.begin[i] = i;
  if (i == 0) slots.count = pairs;
  __syncthreads();
}

__device__ __forceinline__ void slots_of_pairs(Slots& slots, SlotScratch& scratch, int expert, int pairs,
                                               int pairs_of_row) {
  const int i = threadIdx.x;
  if (i < pairs) scratch.expert[i] = expert;
  __syncthreads();
  if (i < pairs) {
    int lower = 0, before = 0;
#pragma unroll 8
    for (int other = 0; other < pairs; ++other) {
      const int its = scratch.expert[other];
      lower += its < expert;
      before += its == expert && other < i;
    }
    slots.pairs[lower + before] = i;
    slots.rows[lower + before] = i / pairs_of_row;
    scratch.ordered[lower + before] = 2 * expert + (before % kSlotPairs == 0);
  }
  __syncthreads();
  const int ordered = i < pairs ? scratch.ordered[i] : 0;
  const unsigned starts = __ballot_sync(0xffffffffu, ordered & 1);
  if (i % 32 == 0 && i < kMaxPairs) scratch.starts[i / 32] = starts;
  __syncthreads();
  int slot = 0;
  for (int w = 0; w < min(i, kMaxPairs) / 32; ++w) slot += __popc(scratch.starts[w]);
  slot += __popc(starts & ((1u << i % 32) - 1));
  if (ordered & 1) slots.expert[slot] = ordered / 2, slots.begin[slot] = i;
  if (i == pairs - 1) slots.count = slot + (ordered & 1), slots.begin[slot + (ordered & 1)] = pairs;
  __syncthreads();
}

// All threads of a CTA of at least kMaxPairs take part. pairs_of_row: top_k, or 1 where each pair reads a row of its
// own. `experts` are 64-bit integers, of which the lower halves are
// read; an expert that there is not ends the kernel with an error, as an index out of range does in PyTorch.
__device__ __forceinline__ void make_slots(Slots& slots, SlotScratch& scratch, const Choices& c, int pairs_of_row) {
  const int i = threadIdx.x, pairs = c.rows * c.top_k;
  const int expert = i < pairs ? load_now(reinterpret_cast<const int*>(c.experts + i)) : 0;
  if (static_cast<unsigned>(expert) >= static_cast<unsigned>(c.expert_count)) __trap();
  if (c.rows == 1) return slots_of_one_row(slots, expert, pairs, pairs_of_row);
  slots_of_pairs(slots, scratch, expert, pairs, pairs_of_row);
}

}  // namespace hf_fastpath::moe
