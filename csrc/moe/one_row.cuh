// A mixture's packed experts for one row of x, by integer tensor cores (common/digits.cuh): both of moe_experts.cu's
// kernels. A CTA takes a tile of outputs (of gate and of up) for all of the row's experts, one after the other, and its
// warps divide K. Nothing is to be found out about the pairs first: each expert has one.
#pragma once

#include "../common/decode_epilogue.cuh"
#include "../common/launch.cuh"
#include "../common/weight_ring.cuh"

namespace hf_fastpath::moe {

constexpr int kOneRowWarps = 8, kOneRowThreads = 32 * kOneRowWarps;
constexpr int kOneRowExperts = 16;  // of the row, at most: with an output of each a thread has something to do

template <typename T>
struct OneRowParams {
  const T* x;  // (hidden)
  const int64_t* experts;
  const T* shares;
  const T* residual;  // (hidden) or nullptr
  T* inner;           // (top_k, intermediate)
  T* y;               // (hidden)
  digits::Packed gate_up, down;
  int top_k, expert_count, hidden, intermediate;
};

// The first kernel has weights of two tiles under way, the second one of all of its experts where K is short: those of
// the second are asked for while the first runs.
constexpr int kOneRowGateUpStages = 5, kOneRowDownStages = 9;
template <typename W>
using GateUpRing = digits::WeightRing<W, 2, kOneRowGateUpStages>;
template <typename W>
using DownRing = digits::WeightRing<W, 1, kOneRowDownStages>;

// A CTA's shared memory: rings, rows of x as digits, sums of [expert][warp][output].
template <typename Ring, int kTiles>
struct OneRowMemory {
  int slots, units, rows, experts;

  OneRowMemory(const digits::Packed& weight, int rows, int experts)
      : slots(Ring::slots_for(experts, weight.units, kOneRowWarps)),
        units(weight.units),
        rows(rows),
        experts(experts) {}
  __host__ __device__ __forceinline__ int ring_bytes() const {
    return kOneRowWarps * slots * static_cast<int>(sizeof(typename Ring::Unit));
  }
  int bytes() const {
    return ring_bytes() + rows * digits::Row::bytes(units) + 4 * experts * kOneRowWarps * kTiles * 16;
  }
  __device__ __forceinline__ unsigned char* row(int i) const {
    return dynamic_shared() + ring_bytes() + i * digits::Row::bytes(units);
  }
  __device__ __forceinline__ float* sums() const { return reinterpret_cast<float*>(row(rows)); }
  __device__ __forceinline__ float total(int expert, int output) const {
    const float* source = sums() + expert * kOneRowWarps * kTiles * 16 + output;
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kOneRowWarps; ++warp) sum += source[warp * kTiles * 16];
    return sum;
  }
};

// The row's experts, one a lane. One that there is not ends the kernel with an error, as an index out of range does in
// PyTorch.
template <typename T>
__device__ __forceinline__ int own_expert(const OneRowParams<T>& p, int lane) {
  const int expert = lane < p.top_k ? load_now(reinterpret_cast<const int*>(p.experts + lane)) : 0;
  if (static_cast<unsigned>(expert) >= static_cast<unsigned>(p.expert_count)) __trap();
  return expert;
}

// All experts' products of the CTA's tiles, to `memory`'s sums. step: rows of x from one expert to the next, 0 or 1.
template <typename W, int kTiles, typename Ring, typename Start>
__device__ __forceinline__ void multiply_experts(Ring& ring, const OneRowMemory<Ring, kTiles>& memory, int step,
                                                 int warp, int lane, Start start) {
  float acc[kTiles][2] = {};
  for (int expert = 0; expert < memory.experts; ++expert) {
    const digits::Row row(memory.row(step * expert), memory.units);
    const digits::Lane own = digits::Lane::of<typename Ring::Unit>(row, lane);
    const unsigned char* b = own.b + ring.first_unit() * digits::kUnitCols;
    const float* factor = row.factors + ring.first_unit();
#pragma unroll 2
    for (int left = ring.units(); left > 0; --left) {
      const unsigned char* const unit = ring.take(start);
      digits::multiply<W>(acc, unit, own, digits::Unit(b, factor));
      b += digits::kUnitCols, ++factor;
    }
    digits::store_sums(acc, memory.sums() + (expert * kOneRowWarps + warp) * kTiles * 16, own, lane);
  }
  __syncthreads();
}

template <typename W>
__global__ void __launch_bounds__(kOneRowThreads, 2)
    one_row_gate_up_kernel(const OneRowParams<typename W::T> p, const OneRowMemory<GateUpRing<W>, 2> memory) {
  using T = typename W::T;
  const int lane = lane_number(), warp = threadIdx.x / 32, tile = blockIdx.x, half = p.intermediate / 16;
  GateUpRing<W> ring(dynamic_shared(), memory.slots, p.gate_up, warp, kOneRowWarps, lane);
  wait_for_previous_kernel();
  const int expert = own_expert(p, lane);
  const auto start = [&](int block) {
    ring.begin(static_cast<int64_t>(__shfl_sync(kFullWarp, expert, block)) * 2 * half + tile, half);
  };
  digits::store_rows<kOneRowThreads>(memory.row(0), p.x, 1, p.hidden, [&] {
    let_next_kernel_begin();
    ring.fill(p.top_k, kOneRowGateUpStages, start);
  });
  __syncthreads();
  multiply_experts<W>(ring, memory, 0, warp, lane, start);
  const int i = threadIdx.x, k = i / 16, output = i % 16;
  if (k >= p.top_k) return;
  p.inner[static_cast<int64_t>(k) * p.intermediate + tile * 16 + output] =
      linear::swiglu<T>(memory.total(k, output), memory.total(k, 16 + output));
}

template <typename W>
__global__ void __launch_bounds__(kOneRowThreads, 2)
    one_row_down_kernel(const OneRowParams<typename W::T> p, const OneRowMemory<DownRing<W>, 1> memory) {
  using T = typename W::T;
  const int lane = lane_number(), warp = threadIdx.x / 32, tile = blockIdx.x;
  DownRing<W> ring(dynamic_shared(), memory.slots, p.down, warp, kOneRowWarps, lane);
  // The kernel before let this one begin when it had waited for the one that computed `experts`.
  const int expert = own_expert(p, lane);
  const auto start = [&](int block) {
    ring.begin(static_cast<int64_t>(__shfl_sync(kFullWarp, expert, block)) * (p.hidden / 16) + tile, 0);
  };
  ring.fill(p.top_k, kOneRowDownStages, start);
  wait_for_previous_kernel();
  digits::store_rows<kOneRowThreads>(memory.row(0), p.inner, p.top_k, p.intermediate, [] { let_next_kernel_begin(); });
  const int column = tile * 16 + static_cast<int>(threadIdx.x) % 16;
  const float share = lane < p.top_k ? to_float(p.shares[lane]) : 0.0f;
  const float residual = p.residual ? to_float(p.residual[column]) : 0.0f;
  __syncthreads();
  multiply_experts<W>(ring, memory, 1, warp, lane, start);
  if (warp > 0) return;
  float sum = 0.0f;
  for (int k = 0; k < p.top_k; ++k) sum = fmaf(memory.total(k, lane % 16), __shfl_sync(kFullWarp, share, k), sum);
  if (p.residual) sum += residual;
  if (lane < 16) p.y[column] = from_float<T>(sum);
}

// Whether these kernels take it: whole units and few experts, for which there is memory.
template <typename W, typename V>
bool takes_one_row(const OneRowParams<typename W::T>& p) {
  const OneRowMemory<GateUpRing<W>, 2> gate_up(p.gate_up, 1, p.top_k);
  const OneRowMemory<DownRing<V>, 1> down(p.down, p.top_k, p.top_k);
  return p.top_k <= kOneRowExperts && p.hidden % digits::kUnitCols == 0 && p.intermediate % digits::kUnitCols == 0 &&
         gate_up.bytes() <= max_shared_bytes() && down.bytes() <= max_shared_bytes();
}

// W: the format of gate_up, V: that of down.
template <typename W, typename V>
cudaError_t launch_one_row(const OneRowParams<typename W::T>& p, cudaStream_t stream) {
  const OneRowMemory<GateUpRing<W>, 2> gate_up(p.gate_up, 1, p.top_k);
  const OneRowMemory<DownRing<V>, 1> down(p.down, p.top_k, p.top_k);
  const auto queue = [&](auto kernel, int tiles, const auto& memory) {
    if (has_early_launch())
      return launch_kernel_early(kernel, tiles, kOneRowThreads, memory.bytes(), stream, p, memory);
    return launch_kernel_with_shared(kernel, tiles, kOneRowThreads, memory.bytes(), stream, p, memory);
  };
  const cudaError_t error = queue(one_row_gate_up_kernel<W>, p.intermediate / 16, gate_up);
  return error != cudaSuccess ? error : queue(one_row_down_kernel<V>, p.hidden / 16, down);
}

}  // namespace hf_fastpath::moe
