// What the kernels share that give a cache's tokens back as floats, some of them being in full precision.
#pragma once

#include <algorithm>

#include "../common/launch.cuh"
#include "rows.cuh"

namespace hf_fastpath::kv {

constexpr int kExpandThreads = 128;

// The sinks that are wanted, the first token behind the sinks that is, and the first of its kTokens neighbours.
struct ExpandStart {
  int64_t sinks, behind, aligned;

  __host__ __device__ ExpandStart(const KvExpandArgs& p, int tokens)
      : sinks(p.first < p.sinks ? p.sinks - p.first : 0),
        behind(p.first > p.sinks ? p.first - p.sinks : 0),
        aligned(behind / tokens * tokens) {}
};

// Where a thread works: 8 channels of one of the sinks, or else of kTokens neighbours behind them, from `token` on.
template <int kTokens>
struct ExpandPlace {
  int64_t pair, token, start, stop;  // start, stop: the tokens that are wanted
  int64_t quantized;                 // so many tokens behind the sinks are
  int channel;
  bool is_sink;

  // The first thing in a kernel.
  __device__ __forceinline__ explicit ExpandPlace(const KvExpandArgs& p) {
    wait_for_previous_kernel();
    let_next_kernel_begin();
    const int octets = p.dim / kPerLane;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kExpandThreads + threadIdx.x;
    const int64_t unit = index / octets;
    channel = static_cast<int>(index % octets) * kPerLane;
    pair = blockIdx.y + static_cast<int64_t>(blockIdx.z) * gridDim.y;
    const ExpandStart first(p, kTokens);
    is_sink = unit < first.sinks;
    token = is_sink ? p.first + unit : first.aligned + (unit - first.sinks) * kTokens;
    start = is_sink ? p.first : first.behind;
    stop = p.first + p.length - (is_sink ? 0 : p.sinks);
    if (pair >= p.pairs) stop = 0;
    quantized = stop > 0 ? max(p.lengths[pair] - p.sinks, 0) / p.group * p.group : 0;
  }

  // 8 channels of a sink or of a token in the tail.
  template <typename T>
  __device__ __forceinline__ uint4 full_row(const KvExpandArgs& p, int64_t number) const {
    const T* rows = static_cast<const T*>(is_sink ? p.full.sinks : p.full.tail);
    const int64_t row = is_sink ? pair * p.sinks + number : pair * p.group + number % p.group;
    return *reinterpret_cast<const uint4*>(rows + row * p.dim + channel);
  }
  template <typename T>
  __device__ __forceinline__ void store(const KvExpandArgs& p, int64_t number, const uint4& bits) const {
    const int64_t row = pair * p.length + number + (is_sink ? 0 : p.sinks) - p.first;
    *reinterpret_cast<uint4*>(static_cast<T*>(p.out) + row * p.dim + channel) = bits;
  }
};

// `tokens`: those of a thread.
template <typename Kernel>
cudaError_t launch_expand(Kernel* kernel, const KvExpandArgs& p, int tokens, cudaStream_t stream) {
  const ExpandStart first(p, tokens);
  const int64_t behind = std::max<int64_t>(p.first + p.length - p.sinks - first.aligned, 0);
  const int64_t threads = (first.sinks + (behind + tokens - 1) / tokens) * (p.dim / kPerLane);
  const int64_t pairs = std::min<int64_t>(p.pairs, 65535);
  const dim3 grid(static_cast<unsigned>((threads + kExpandThreads - 1) / kExpandThreads), static_cast<unsigned>(pairs),
                  static_cast<unsigned>((p.pairs + pairs - 1) / pairs));
  return launch_kernel_early_if_possible(kernel, grid, kExpandThreads, stream, p);
}

}  // namespace hf_fastpath::kv
