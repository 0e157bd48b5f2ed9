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
  float share[kMaxPairs];         // by the pair's number: room for who wants them
  uint16_t begin[kMaxPairs + 2];  // in `pairs`
  uint16_t pairs[kMaxPairs];
  uint16_t rows[kMaxPairs];  // what the pair reads: pair / pairs_of_row

  __device__ __forceinline__ int size(int slot) const { return begin[slot + 1] - begin[slot]; }
};

// What slots are made from.
struct Choices {
  const int64_t* experts;
  int rows, top_k, expert_count;
};

// What is needed only while slots are made.
struct alignas(16) SlotScratch {
  unsigned keys[kMaxPairs];     // kMaxPairs * expert + pair; of pairs that there are not, the largest
  unsigned ordered[kMaxPairs];  // the same by size
  unsigned heads[kMaxPairs / 32], starts[kMaxPairs / 32];  // where an expert's pairs and where slots start in `ordered`
};

// The experts of a row are all different, so that one row's pairs are slots as they stand.
__device__ __forceinline__ void slots_of_one_row(Slots& slots, int expert, int pairs, int pairs_of_row) {
  const int i = threadIdx.x;
  if (i < pairs) slots.expert[i] = expert, slots.pairs[i] = slots.begin[i] = i;
  if (i < pairs) slots.rows[i] = pairs_of_row == 1 ? i : 0;
  if (i == 0) slots.count = slots.begin[pairs] = pairs;
  __syncthreads();
}

// How many bits are set before bit i of an array of words, or the last of them that is set.
__device__ __forceinline__ int bits_before(const unsigned* words, int i) {
  int count = __popc(words[i / 32] & ((1u << i % 32) - 1));
  for (int w = 0; w < i / 32; ++w) count += __popc(words[w]);
  return count;
}
__device__ __forceinline__ int last_bit_up_to(const unsigned* words, int i) {
  int w = i / 32;
  unsigned word = words[w] & (0xffffffffu >> (31 - i % 32));
  while (!word) word = words[--w];
#pragma unroll
  for (int shift = 1; shift < 32; shift *= 2) word |= word >> shift;
  return 32 * w + __popc(word) - 1;
}

__device__ __forceinline__ void slots_of_pairs(Slots& slots, SlotScratch& scratch, int expert, int pairs,
                                               int pairs_of_row) {
  const int i = threadIdx.x;
  const unsigned key = static_cast<unsigned>(expert) * kMaxPairs + i;
  if (i < kMaxPairs) scratch.keys[i] = i < pairs ? key : 0xffffffffu;
  __syncthreads();
  if (i < pairs) {
    int place = 0;
#pragma unroll 4
    for (int other = 0; other < (pairs + 3) / 4; ++other) {
      const uint4 keys = reinterpret_cast<const uint4*>(scratch.keys)[other];
      place += (keys.x < key) + (keys.y < key) + (keys.z < key) + (keys.w < key);
    }
    scratch.ordered[place] = key;
  }
  __syncthreads();
  const unsigned own = i < pairs ? scratch.ordered[i] : 0;
  const bool head = i < pairs && (i == 0 || scratch.ordered[i - 1] / kMaxPairs != own / kMaxPairs);
  const unsigned heads = __ballot_sync(0xffffffffu, head);
  if (i % 32 == 0 && i < kMaxPairs) scratch.heads[i / 32] = heads;
  __syncthreads();
  const bool start = i < pairs && (i - last_bit_up_to(scratch.heads, i)) % kSlotPairs == 0;
  const unsigned starts = __ballot_sync(0xffffffffu, start);
  if (i % 32 == 0 && i < kMaxPairs) scratch.starts[i / 32] = starts;
  __syncthreads();
  if (i < pairs) {
    const int slot = bits_before(scratch.starts, i);
    slots.pairs[i] = own % kMaxPairs;
    slots.rows[i] = own % kMaxPairs / pairs_of_row;
    if (start) slots.expert[slot] = own / kMaxPairs, slots.begin[slot] = i;
    if (i == pairs - 1) slots.count = slot + start, slots.begin[slot + start] = pairs;
  }
  __syncthreads();
}

// All threads of a CTA of at least kMaxPairs take part. pairs_of_row: top_k, or 1 where each pair reads a row of its
// own. `experts` are 64-bit integers, of which the lower halves are read; an expert that there is not ends the kernel
// with an error, as an index out of range does in PyTorch.
__device__ __forceinline__ void make_slots(Slots& slots, SlotScratch& scratch, const Choices& c, int pairs_of_row) {
  const int i = threadIdx.x, pairs = c.rows * c.top_k;
  const int expert = i < pairs ? load_now(reinterpret_cast<const int*>(c.experts + i)) : 0;
  if (static_cast<unsigned>(expert) >= static_cast<unsigned>(c.expert_count)) __trap();
  if (c.rows == 1) return slots_of_one_row(slots, expert, pairs, pairs_of_row);
  slots_of_pairs(slots, scratch, expert, pairs, pairs_of_row);
}

}  // namespace hf_fastpath::moe
