// Slots (moe/slots.cuh) of up to sixteen pairs: each expert's weights are read once for as many of its rows.
#pragma once

#include "../common/reduce.cuh"
#include "../moe/slots.cuh"

namespace hf_fastpath::moe16 {

using moe::Choices;
using moe::kMaxPairs;
using moe::kSlotPairs;
using moe::Slots;
using moe::SlotScratch;

// Makes one slot of two neighbouring ones that have the same expert, beginning with the expert's first. By all threads
// of a CTA of kMaxPairs.
__device__ __forceinline__ void join_slots(Slots& slots, SlotScratch& scratch) {
  const int i = threadIdx.x, count = slots.count;
  int expert = 0, begin = 0, before = 0;  // before: how many slots the expert has before this one
  if (i < count) {
    expert = slots.expert[i];
    begin = slots.begin[i];
    while (before < i && slots.expert[i - 1 - before] == expert) ++before;
  }
  const int pairs = slots.begin[count];
  const bool starts = i < count && before % 2 == 0;
  const unsigned flags = __ballot_sync(kFullWarp, starts);
  if (i % 32 == 0) scratch.starts[i / 32] = flags;
  __syncthreads();  // besides, all have read what is written now
  int slot = __popc(flags & ((1u << i % 32) - 1));
  for (int w = 0; w < i / 32; ++w) slot += __popc(scratch.starts[w]);
  if (starts) slots.expert[slot] = expert, slots.begin[slot] = begin;
  if (i == count - 1) slots.count = slot + starts, slots.begin[slot + starts] = pairs;
  __syncthreads();
}

}  // namespace hf_fastpath::moe16
