// multiply_slots() of decode.cuh for so many slots that each warp finds work of its own: nothing is added among warps.
#pragma once

#include "decode.cuh"

namespace hf_fastpath::moe {

// A warp's way through its tasks, blocks of outputs of a slot, and through the units of each. Tasks are numbered slot
// by slot; a CTA has neighbours, which read the same rows of x and weights that lie together, and its warps take turns.
struct TaskCursor {
  int task, end, blocks;  // blocks: of an expert
  int slot, block, unit;

  __device__ __forceinline__ TaskCursor(int slots, int blocks, int warp) : blocks(blocks), unit(0) {
    const int64_t tasks = static_cast<int64_t>(slots) * blocks;
    task = static_cast<int>(tasks * blockIdx.x / gridDim.x) + warp;
    end = static_cast<int>(tasks * (blockIdx.x + 1) / gridDim.x);
    settle();
  }
  __device__ __forceinline__ bool there() const { return task < end; }
  // Returns whether that leads to another task.
  __device__ __forceinline__ bool advance(int units, int warps) {
    if (++unit < units) return false;
    unit = 0;
    task += warps;
    settle();
    return true;
  }

 private:
  __device__ __forceinline__ void settle() { slot = task / blocks, block = task - slot * blocks; }
};

// Multiplies slots with the rows of x that they name, in all blocks of outputs. finish(slot, block, sums) is called by
// a warp for every task, with sums[tile][0] as a C fragment of outputs and the slot's pairs; all_asked() once by each
// warp, when it has asked for its last weights.
template <bool kPlain, typename W, int kTiles, int kWarps, int kStages, typename AllAsked, typename Finish>
__device__ __forceinline__ void multiply_whole_slots(Memory<W, kTiles, kWarps, kStages>& memory, const Part& p,
                                                     const typename W::T* x, int blocks, AllAsked all_asked,
                                                     Finish finish) {
  using T = typename W::T;
  const Slots& slots = memory.slots;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  auto* const ring = memory.ring[warp];
  TaskCursor now(slots.count, blocks, warp), ahead = now;
  Source<W, kTiles, kPlain> source(p, ahead.block, blocks, lane);
  bool asked = false;
  const auto copy = [&](int stage) {
    if (ahead.there()) {
      source.copy(ring[stage], p, slots.expert[ahead.slot], ahead.unit, lane);
      if (ahead.advance(p.units, kWarps)) source = Source<W, kTiles, kPlain>(p, ahead.block, blocks, lane);
    } else if (!asked) {
      asked = true;
      all_asked();
    }
    cp_async_commit();
  };
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) copy(s);
  Activations<1, kBlockCols> rows[kUnitBlocks];
  const auto load = [&](int b, const T* row, int unit) {
    load_row<kPlain>(rows[b], row + b * kBlockCols, 0, p.k - (unit * kUnitBlocks + b) * kBlockCols);
  };
  const auto row_at = [&](const TaskCursor& at) { return row_of_slot(slots, at.slot, x, p, at.unit, lane); };
  if (now.there()) {
    const T* const row = row_at(now);
#pragma unroll
    for (int b = 0; b < kUnitBlocks; ++b) load(b, row, 0);
  }
  float acc[kTiles][1][4] = {}, total[kTiles][1][4] = {};
  int stage = 0, chain_units_left = p.chain_units;
  while (now.there()) {
    const TaskCursor done = now;
    const bool ended = now.advance(p.units, kWarps), more = now.there();
    const T* row = nullptr;
    if (more) row = row_at(now);
    cp_async_wait<kStages - 2>();
    __syncwarp();  // all lanes' copies are there, and all have read the stage that is filled now
    copy(stage == 0 ? kStages - 1 : stage - 1);
#pragma unroll
    for (int b = 0; b < kUnitBlocks; ++b) {
      linear::prepare<W, 1>(rows[b]);
      GroupSums<W::kGroups, 1> sums;
      sums.template compute<T>(rows[b], W::kSumFactor);
#pragma unroll
      for (int r = 0; r < kTiles; ++r) W::multiply(acc[r], ring[stage].block[b], r, rows[b], sums, lane);
      if (more) load(b, row, now.unit);
    }
    stage = stage + 1 == kStages ? 0 : stage + 1;
    if (kPlain || --chain_units_left == 0 || ended) {  // a chain's end
      chain_units_left = p.chain_units;
#pragma unroll
      for (int j = 0; j < kTiles * 4; ++j) total[j / 4][0][j % 4] += acc[j / 4][0][j % 4], acc[j / 4][0][j % 4] = 0.0f;
    }
    if (ended) {
      finish(done.slot, done.block, total);
#pragma unroll
      for (int j = 0; j < kTiles * 4; ++j) total[j / 4][0][j % 4] = 0.0f;
    }
  }
}

}  // namespace hf_fastpath::moe
