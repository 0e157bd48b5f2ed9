// y = x @ W.T for one row of x and packed int4 weights: the products of decode_linear.cuh where nothing else shares the
// weights, by integer tensor cores (digits.cuh). A CTA takes blocks of two or three tiles of 16 outputs, its warps
// divide K. What they have of some blocks meets in shared memory at the end, so that no warp waits for another before.
#pragma once

#include "decode_epilogue.cuh"
#include "decode_norm.cuh"
#include "decode_source.cuh"
#include "launch.cuh"
#include "weight_ring.cuh"

namespace hf_fastpath::linear {

constexpr int kOneRowWarps = kWarpsOfRow, kOneRowThreads = 32 * kOneRowWarps;
constexpr int kOneRowStages = 5;  // with six, two CTAs of 4,096 columns would not find room in a multiprocessor
// How many of its units a warp asks for before x is there: not all, which would be in x's way where the kernel before
// this one has just ended.
constexpr int kEarlyUnits = 3;
__device__ __forceinline__ int early_units(int units) {
  return max(1, min(kEarlyUnits, units - 1));
}
constexpr int kMostBlocks = 8;  // whose sums meet at a time: a thread finishes at most one output of theirs
static_assert(kMostBlocks * 2 * 16 <= kOneRowThreads);

// A CTA's shared memory: rings, the row, sums of [block][warp][output].
template <typename W, Epilogue kEpilogue>
struct OneRowMemory {
  static constexpr int kTiles = kRowTiles<kEpilogue>, kOutputs = 16 * kTiles;
  using Ring = digits::WeightRing<W, kTiles, kOneRowStages>;

  int slots, units, blocks;  // blocks: whose sums there is room for

  OneRowMemory(const Params<typename W::T>& p, int grid) : units(p.units) {
    const int all = (p.row_tiles + kTiles - 1) / kTiles, most = (all + grid - 1) / grid;
    slots = Ring::slots_for(most, units, kOneRowWarps);
    blocks = std::min(most, kMostBlocks);
  }
  __host__ __device__ __forceinline__ int ring_bytes() const {
    return kOneRowWarps * slots * static_cast<int>(sizeof(typename Ring::Unit));
  }
  int bytes() const { return ring_bytes() + digits::Row::bytes(units) + 4 * blocks * kOneRowWarps * kOutputs; }
  __device__ __forceinline__ unsigned char* row() const { return dynamic_shared() + ring_bytes(); }
  __device__ __forceinline__ float* sums() const { return reinterpret_cast<float*>(row() + digits::Row::bytes(units)); }
};

// The row's RMSNorm, with the bits of SharedNorm, as digits.
template <typename T>
class OneRowNorm {
 public:
  // Asks for the weights, which no kernel before this one writes.
  __device__ __forceinline__ explicit OneRowNorm(const Params<T>& p) {
#pragma unroll
    for (int i = 0; i < 2; ++i) weight_[i] = load(p.norm_weight, i, p.k);
  }
  // loaded() is called when x has been asked for.
  template <typename Loaded>
  __device__ __forceinline__ void store(const Params<T>& p, const digits::Row& row, Loaded loaded) const {
    __shared__ float squares[kWarpsOfRow];
    uint4 x[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) x[i] = load(p.x, i, p.k);
    loaded();
    const float sum = warp_sum(add_squares<T>(add_squares<T>(0.0f, x[0]), x[1]));
    if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = sum;
    __syncthreads();
    const float inverse = inverse_rms(squares, p.k, p.eps);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (kColsAtOnce * i >= p.k) break;
      const uint4 part[1] = {normalized<T>(x[i], inverse, weight_[i])};
      digits::store_unit<T>(row, part, column(i), column(i) < p.k);
    }
  }

 private:
  static __device__ __forceinline__ int column(int i) { return 8 * static_cast<int>(threadIdx.x) + kColsAtOnce * i; }
  static __device__ __forceinline__ uint4 load(const T* from, int i, int columns) {
    return column(i) < columns ? load_early16(from + column(i)) : make_uint4(0, 0, 0, 0);
  }

  uint4 weight_[2];
};

// A thread's output of some blocks, and what it is added to, which is asked for before the sums are there.
template <typename W, Epilogue kEpilogue>
class OneRowOutput {
 public:
  using T = typename W::T;
  static constexpr int kTiles = kRowTiles<kEpilogue>, kOutputs = 16 * kTiles;

  // first_tile: the first block's, of the weight's first part.
  __device__ __forceinline__ void prepare(const Params<T>& p, int first_tile, int tiles, int blocks) {
    constexpr int kOwn = kParts<kEpilogue> > 1 ? 16 : kOutputs;  // threads of a block
    const int i = threadIdx.x;
    block_ = i / kOwn;
    column_ = first_tile * 16 + i;
    there_ = block_ < blocks && i < 16 * tiles && column_ < p.n / kParts<kEpilogue>;
    if (!there_) return;
    if constexpr (kEpilogue == Epilogue::kShortConv) conv_.load(p, 0, column_);
#pragma unroll
    for (int part = 0; part < kParts<kEpilogue>; ++part) {
      bias_[part] = p.bias ? to_float(p.bias[part * (p.n / kParts<kEpilogue>)+column_]) : 0.0f;
    }
    if (kEpilogue == Epilogue::kResidual && p.residual) residual_ = to_float(p.residual[column_]);
  }

  // sums: [block][warp][output], of all warps.
  __device__ __forceinline__ void store(const Params<T>& p, const float* sums) const {
    if (!there_) return;
    const auto total = [&](int output) {
      const float* source = sums + block_ * kOneRowWarps * kOutputs + output;
      float sum = 0.0f;
#pragma unroll
      for (int warp = 0; warp < kOneRowWarps; ++warp) sum += source[warp * kOutputs];
      return sum;
    };
    const int output = static_cast<int>(threadIdx.x) % (kParts<kEpilogue> > 1 ? 16 : kOutputs);
    if constexpr (kEpilogue == Epilogue::kShortConv) {
      const float b = total(output) + bias_[0], c = total(16 + output) + bias_[1];
      conv_.finish(p, 0, column_, b, c, total(32 + output) + bias_[2]);
    } else if constexpr (kEpilogue == Epilogue::kSwiGlu) {
      p.y[column_] = swiglu<T>(total(output) + bias_[0], total(16 + output) + bias_[1]);
    } else {
      float sum = total(output) + bias_[0];
      if (kEpilogue == Epilogue::kResidual && p.residual) sum += residual_;
      p.y[column_] = from_float<T>(sum);
    }
  }

 private:
  int block_, column_;
  bool there_;
  float bias_[kParts<kEpilogue>], residual_;
  ConvStep<T> conv_;
};

template <typename W, bool kNorm, Epilogue kEpilogue>
__global__ void __launch_bounds__(kOneRowThreads, 2)
    one_row_kernel(const Params<typename W::T> p, const OneRowMemory<W, kEpilogue> memory) {
  using T = typename W::T;
  using Memory = OneRowMemory<W, kEpilogue>;
  constexpr int kTiles = Memory::kTiles, kOwnTiles = kBlockRows<kEpilogue>;
  const int lane = lane_number(), warp = threadIdx.x / 32;
  const RowRange<kEpilogue> range(p.row_tiles);
  const int blocks = (range.count + kOwnTiles - 1) / kOwnTiles;
  const digits::Packed weight = {reinterpret_cast<const unsigned char*>(p.qweight),
                                 reinterpret_cast<const unsigned char*>(p.scales), p.zeros, p.units};
  typename Memory::Ring ring(dynamic_shared(), memory.slots, weight, warp, kOneRowWarps, lane);
  const auto start = [&](int block) {
    // Where a block's second tile is not there it is the first one once more.
    const bool whole = (block + 1) * kOwnTiles <= range.count;
    ring.begin(range.first + block * kOwnTiles, whole ? row_step<kEpilogue>(p) : 0);
  };
  ring.fill(blocks, early_units(ring.units()), start);
  const auto loaded = [&] {
    let_next_kernel_begin();
    ring.fill_rest(start);
  };
  if constexpr (kEpilogue == Epilogue::kShortConv) prefetch_conv<1>(p, range.first);
  const digits::Row row(memory.row(), p.units);
  if constexpr (kNorm) {
    const OneRowNorm<T> norm(p);
    wait_for_previous_kernel();
    norm.store(p, row, loaded);
  } else {
    wait_for_previous_kernel();
    digits::store_rows<kOneRowThreads>(memory.row(), p.x, 1, p.k, loaded);
  }
  OneRowOutput<W, kEpilogue> output;
  output.prepare(p, range.first, range.count, min(blocks, memory.blocks));
  __syncthreads();
  const digits::Lane own = digits::Lane::of<typename Memory::Ring::Unit>(row, lane);
  float acc[kTiles][2] = {};
  float* const sums = memory.sums();
  for (int block = 0, of_round = 0; block < blocks; ++block) {
    const unsigned char* b = own.b + ring.first_unit() * digits::kUnitCols;
    const float* factor = row.factors + ring.first_unit();
#pragma unroll 2
    for (int left = ring.units(); left > 0; --left) {
      const unsigned char* const unit = ring.take(start);
      digits::multiply<W>(acc, unit, own, digits::Unit(b, factor));
      b += digits::kUnitCols, ++factor;
    }
    digits::store_sums(acc, sums + (of_round * kOneRowWarps + warp) * Memory::kOutputs, own, lane);
    if (++of_round < memory.blocks && block + 1 < blocks) continue;
    __syncthreads();
    output.store(p, sums);
    if (block + 1 == blocks) break;
    const int done = (block + 1) * kOwnTiles;
    output.prepare(p, range.first + done, range.count - done, min(blocks - block - 1, memory.blocks));
    of_round = 0;
    __syncthreads();
  }
}

// Whether the kernel takes a product: one row of whole units, for which the GPU has shared memory.
template <typename W, Epilogue kEpilogue>
bool takes_one_row(const Params<typename W::T>& p, int grid) {
  return p.m == 1 && p.k % digits::kUnitCols == 0 && aligned_to(p.x, 16) && aligned_to(p.scales, 16) &&
         aligned_to(p.zeros, 16) && OneRowMemory<W, kEpilogue>(p, grid).bytes() <= max_shared_bytes();
}

template <typename W, Epilogue kEpilogue>
cudaError_t launch_one_row(const Params<typename W::T>& p, int grid, cudaStream_t stream) {
  const OneRowMemory<W, kEpilogue> memory(p, grid);
  const auto queue = [&](auto kernel) {
    if (has_early_launch()) return launch_kernel_early(kernel, grid, kOneRowThreads, memory.bytes(), stream, p, memory);
    return launch_kernel_with_shared(kernel, grid, kOneRowThreads, memory.bytes(), stream, p, memory);
  };
  if constexpr (kEpilogue != Epilogue::kBias) {  // the plain product knows no norm
    if (p.norm_weight) return queue(one_row_kernel<W, true, kEpilogue>);
  }
  return queue(one_row_kernel<W, false, kEpilogue>);
}

}  // namespace hf_fastpath::linear
