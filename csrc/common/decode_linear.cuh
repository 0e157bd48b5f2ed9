// y = x @ W.T for 1..16 rows of x: what the kernels for packed weights share.
//
// The weights are the A operand of mma.m16n8k16, so a tile of 16 outputs meets 8 rows of x in one instruction and the
// tensor core is no slower for 8 rows than for 1. A CTA takes blocks of two or three tiles of 16 outputs; its warps
// split K in units of W::kUnitCols columns. Unit u belongs to chain u % chains, and the chains' sums are added in their
// order; a warp has one chain or two. The number of chains depends on K alone, so a row's bits do not depend on the
// others.
//
// More than 8 rows of x are a larger traffic than the weights. A warp's units of them stay in registers where K has at
// most kHeldCols columns for each warp; more memory is then left for weights that are under way.
//
// Weights come through shared memory: every warp has a ring of kStages units of its own, which it fills and empties
// without meeting the other warps. The first units are asked for before the kernel waits for the one before it
// (programmatic dependent launch), so that the memory does not rest between kernels.
//
// A weight format W (int4_weights.cuh, w8a16_linear.cu, weights_16bit.cuh) has: T, kUnitCols, kGroups (those of a unit
// whose sums of x it wants, times kSumFactor; 0: none), kRowScales (one scale an output, applied at the end),
// kWideOutput (whether it can put out float32), Stage (a unit in shared memory), Source (which fills it), prepared()
// (of eight values of x) and multiply(), and a Tuning.
#pragma once

#include "decode_epilogue.cuh"
#include "decode_norm.cuh"
#include "decode_source.cuh"
#include "decode_types.cuh"
#include "launch.cuh"

namespace hf_fastpath::linear {

// Where this lane's part of each of its rows of x begins. Rows that are not there are the last one once more: what the
// tensor core makes of them is a column of its own, which nobody stores, and a clamped pointer costs less than a zero.
template <typename T, int kColTiles>
struct Rows {
  const T* begin[kColTiles];

  __device__ __forceinline__ Rows(const Params<T>& p, int lane) {
#pragma unroll
    for (int c = 0; c < kColTiles; ++c) {
      begin[c] = p.x + min(lane / 4 + 8 * c, p.m - 1) * p.x_row_stride + 8 * (lane % 4);
    }
  }
};

// kWhole (see launch()): rows are aligned to 16 bytes and units are whole; an empty unit has some x, but no weights.
template <bool kWhole, typename T, int kColTiles, int kUnitCols>
__device__ __forceinline__ void load_activations(Activations<kColTiles, kUnitCols>& x, const Params<T>& p,
                                                 const Rows<T, kColTiles>& rows, int unit) {
  const unsigned column = (kWhole ? min(unit, p.units - 1) : unit) * kUnitCols;
#pragma unroll
  for (int c = 0; c < kColTiles; ++c) {
#pragma unroll
    for (int h = 0; h < kUnitCols / 32; ++h) {
      const T* begin = rows.begin[c] + column + 32 * h;
      if constexpr (kWhole) {
        x.half_tile[c][h] = load_early16(begin);
      } else {
        x.half_tile[c][h] = make_uint4(0, 0, 0, 0);
        if (static_cast<int>(column) + 32 * h < p.k) x.half_tile[c][h] = load_8x16bit<false>(begin);
      }
    }
  }
}

template <typename W, int kColTiles>
__device__ __forceinline__ void prepare(Activations<kColTiles, W::kUnitCols>& x) {
#pragma unroll
  for (int c = 0; c < kColTiles; ++c) {
#pragma unroll
    for (uint4& part : x.half_tile[c]) part = W::prepared(part);
  }
}

// The sums of prepared x over each group of a unit, times a factor, for this lane's columns 2t and 2t + 1 of the C
// fragment.
template <int kGroups, int kColTiles>
struct GroupSums {
  float2 value[kGroups][kColTiles];

  // The tensor core adds: A is ones.
  template <typename T, int kUnitCols>
  __device__ __forceinline__ void compute(const Activations<kColTiles, kUnitCols>& x, float factor) {
    constexpr uint32_t kOnes = Nibbles<T>::kOnes, kAllOnes[4] = {kOnes, kOnes, kOnes, kOnes};
    constexpr int kSteps = kUnitCols / 16 / kGroups;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int c = 0; c < kColTiles; ++c) {
        float sum[2][4] = {};
#pragma unroll
        for (int i = group * kSteps; i < (group + 1) * kSteps; ++i) {
          const uint4& b = x.half_tile[c][i / 2];
          mma_m16n8k16<T>(sum[i % 2], kAllOnes, i % 2 ? b.z : b.x, i % 2 ? b.w : b.y);
        }
        value[group][c] = make_float2(factor * (sum[0][0] + sum[1][0]), factor * (sum[0][1] + sum[1][1]));
      }
    }
  }
  // `kept` is the unit's place: floats of [group][row of x].
  __device__ __forceinline__ void keep(float* kept, int lane) const {
    if (lane >= 4) return;
    float2* target = reinterpret_cast<float2*>(kept) + lane;
#pragma unroll
    for (int i = 0; i < kGroups * kColTiles; ++i) target[4 * i] = value[i / kColTiles][i % kColTiles];
  }
  __device__ __forceinline__ void read(const float* kept, int lane) {
    const float2* source = reinterpret_cast<const float2*>(kept) + lane % 4;
#pragma unroll
    for (int i = 0; i < kGroups * kColTiles; ++i) value[i / kColTiles][i % kColTiles] = source[4 * i];
  }
};
template <int kColTiles>
struct GroupSums<0, kColTiles> {};

// Where a CTA has x. kStreamed: in global memory, a warp reads each unit ahead of its use, for every block anew. kHeld:
// each warp has its units in registers. kShared: up to kSharedRows rows, normalized, in shared memory.
enum class Place { kStreamed, kHeld, kShared };
constexpr int kSharedRows = 4;
constexpr int kSharedGap = 64;  // bytes between rows, which keep two rows' parts of a unit in different banks

// The shared memory of a CTA: the rings of its warps, partial sums, the groups' sums of x of all units, x.
template <typename W, int kColTiles, int kWarps, int kChains, int kStages, int kTiles>
struct Shared {
  using Stage = typename W::template StageOf<kTiles>;
  static constexpr int kPartialFloats = kChains * kTiles * 8 * kColTiles * kPartialPitch;
  static constexpr int kPartials = kChains == 8 ? 2 : 1;  // as many as there is memory for, whatever K
  static constexpr int kUnitFloats = W::kGroups * 8 * kColTiles;
  static int bytes(int units) {
    return static_cast<int>(kWarps * kStages * sizeof(Stage)) +
           4 * (kPartials * kPartialFloats + padded(units) * kUnitFloats);
  }
  static __host__ __device__ __forceinline__ int x_pitch(int units) {
    return static_cast<int>(sizeof(typename W::T)) * W::kUnitCols * units + kSharedGap;
  }
  // Whole rounds of the chains.
  static __host__ __device__ __forceinline__ int padded(int units) { return (units + kChains - 1) / kChains * kChains; }
  static __device__ __forceinline__ Stage* ring(int warp) {
    return reinterpret_cast<Stage*>(dynamic_shared()) + warp * kStages;
  }
  // With two, blocks take turns: while some warps still add, others have the next block's sums.
  static __device__ __forceinline__ float* partial(int block) {
    return reinterpret_cast<float*>(ring(kWarps)) + block % kPartials * kPartialFloats;
  }
  static __device__ __forceinline__ float* group_sums(int unit) {
    return partial(0) + kPartials * kPartialFloats + unit * kUnitFloats;
  }
  static __device__ __forceinline__ unsigned char* x(int units) {
    return reinterpret_cast<unsigned char*>(group_sums(padded(units)));
  }
};

// How the kernels of a format share a multiprocessor.
template <typename W>
struct Tuning {
  // With more than 8 rows of x, or three row tiles, a thread wants more than 128 registers.
  static __host__ __device__ constexpr int ctas_per_sm(Place, int col_tiles, int warps, int tiles) {
    return col_tiles == 1 && warps == 8 && tiles == 2 ? 2 : 1;
  }
  // Of a warp's ring. Three row tiles are half more, and those who want them have few units and one block.
  static __host__ __device__ constexpr int stages(Place place, int, int tiles) {
    return place == Place::kHeld && tiles == 2 ? 4 : 3;
  }
  // Of a CTA with up to 8 rows of a long K, 16 chains.
  static constexpr int kLongWarps = 16;
  // From how many rows on, up to 8, a CTA with many blocks holds x; more than 8 rows have a rule of their own.
  static constexpr int kHoldFrom = 9;
};
constexpr int kHeldCols = 512;  // columns of x that a warp can have in registers, of 16 rows
constexpr int kShortK = 8 * kHeldCols;

template <typename W, int kColTiles, int kWarps, int kChains, Place kPlace, bool kWhole, Epilogue kEpilogue>
__global__ void __launch_bounds__(32 * kWarps, Tuning<W>::ctas_per_sm(kPlace, kColTiles, kWarps, kRowTiles<kEpilogue>))
    linear_kernel(const Params<typename W::T> p) {
  using T = typename W::T;
  constexpr bool kHeldX = kPlace == Place::kHeld, kSharedX = kPlace == Place::kShared;
  static_assert(!kSharedX || (kColTiles == 1 && kWarps == kWarpsOfRow && kChains == kWarps));
  constexpr int kTiles = kRowTiles<kEpilogue>, kStages = Tuning<W>::stages(kPlace, kColTiles, kTiles);
  using Memory = Shared<W, kColTiles, kWarps, kChains, kStages, kTiles>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  typename Memory::Stage* const ring = Memory::ring(warp);
  const int padded_units = Memory::padded(p.units);
  const RowRange<kEpilogue> range(p.row_tiles);
  int row_tile = range.first;
  Cursor<kEpilogue, kWarps> now{warp, range.count, false}, ahead = now;
  typename W::template Source<kEpilogue, kWhole, kWarps> source(p, row_tile, padded_units, lane);
  const Rows<T, kColTiles> rows(p, lane);
  const int blocks = (range.count + kBlockRows<kEpilogue> - 1) / kBlockRows<kEpilogue>;
  int left = blocks * (padded_units / kWarps), to_copy = left;
  const auto copy = [&](typename Memory::Stage* stage) {
    if (to_copy > 0 && (!kWhole || ahead.unit < p.units)) source.copy(*stage, p, ahead, lane);
    cp_async_commit();
    --to_copy;
    ahead.advance(padded_units);
    source.advance(ahead.wrapped);
  };
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) copy(ring + s);
  if constexpr (kEpilogue == Epilogue::kShortConv) prefetch_conv<8 * kColTiles>(p, row_tile);

  constexpr int kXs = kHeldX ? kHeldCols / W::kUnitCols : kSharedX ? 1 : 2;
  Activations<kColTiles, W::kUnitCols> x[kXs];
  [[maybe_unused]] const unsigned char* shared_x = nullptr;  // this lane's part of its row
  if constexpr (kSharedX) {
    SharedNorm<kSharedRows, T> norm(p);
    wait_for_previous_kernel();
    norm.load(p);
    let_next_kernel_begin();
    const int pitch = Memory::x_pitch(p.units);
    norm.template store<W>(Memory::x(p.units), pitch, W::kUnitCols * p.units, p);
    shared_x = Memory::x(p.units) + min(lane / 4, p.m - 1) * pitch + 16 * (lane % 4);
  } else {
    wait_for_previous_kernel();
  }
  if constexpr (kHeldX) {
#pragma unroll
    for (int d = 0; d < kXs; ++d) {
      if (d * kWarps < padded_units) load_activations<kWhole>(x[d], p, rows, now.unit + d * kWarps);
    }
  } else if constexpr (!kSharedX) {
    load_activations<kWhole>(x[0], p, rows, now.unit);
  }
  if constexpr (!kSharedX) let_next_kernel_begin();
  constexpr int kOwnChains = kChains / kWarps;
  float acc[kOwnChains][kTiles][kColTiles][4] = {};
  typename Memory::Stage *stage = ring, *last_read = ring + kStages - 1;
  int block = 0, block_rows_left = range.count;
  const auto end_block = [&] {
    finish_block<W, kEpilogue, kWarps>(acc, Memory::partial(block++), p, row_tile, block_rows_left);
    if constexpr (Memory::kPartials == 1) __syncthreads();
    row_tile += kBlockRows<kEpilogue>;
    block_rows_left -= kBlockRows<kEpilogue>;
    clear(acc);
  };
  while (left > 0) {
#pragma unroll
    for (int d = 0; d < kXs; ++d) {
      if (kHeldX ? d * kWarps >= padded_units : left <= 0) continue;  // a loop with two exits would not be unrolled
      const int unit = now.unit;
      const bool first_block = now.rows_left == range.count;
      now.advance(padded_units);
      if constexpr (kSharedX) {
        const uint4* part = reinterpret_cast<const uint4*>(shared_x + min(unit, p.units - 1) * 2 * W::kUnitCols);
#pragma unroll
        for (int h = 0; h < W::kUnitCols / 32; ++h) x[d].half_tile[0][h] = part[4 * h];
      } else if constexpr (!kHeldX) {
        load_activations<kWhole>(x[1 - d], p, rows, now.unit);
      }
      cp_async_wait<kStages - 2>();
      __syncwarp();  // all lanes' copies are there, and all have read the stage that is filled now
      copy(last_read);
      if (kHeldX ? first_block : !kSharedX) prepare<W, kColTiles>(x[d]);
      GroupSums<W::kGroups, kColTiles> sums;
      if constexpr (W::kGroups > 0) {
        float* kept = Memory::group_sums(unit);
        if (first_block) {
          sums.template compute<T>(x[d], W::kSumFactor);
          sums.keep(kept, lane);
        } else {
          sums.read(kept, lane);
        }
      }
      if (!kWhole || unit < p.units) {
#pragma unroll
        for (int r = 0; r < kTiles; ++r) W::multiply(acc[d % kOwnChains][r], *stage, r, x[d], sums, lane);
      }
      last_read = stage;
      stage = stage == ring + kStages - 1 ? ring : stage + 1;
      if (!kHeldX && now.wrapped) end_block();
      --left;
    }
    if constexpr (kHeldX) end_block();
  }
}

// kWhole: rows of x start at multiples of 16 bytes, and units are whole, so that nothing has to be checked for each
// load of x.
template <typename W, int kColTiles, int kWarps, int kChains, Place kPlace, bool kWhole, Epilogue kEpilogue>
cudaError_t launch(const Params<typename W::T>& p, int sm_count, cudaStream_t stream) {
  constexpr int kTiles = kRowTiles<kEpilogue>;
  const int blocks = (p.row_tiles + kTiles - 1) / kTiles;
  constexpr int kCtas = Tuning<W>::ctas_per_sm(kPlace, kColTiles, kWarps, kTiles);
  constexpr int kStages = Tuning<W>::stages(kPlace, kColTiles, kTiles);
  const int grid = std::min(blocks, kCtas * sm_count), threads = 32 * kWarps;
  using Memory = Shared<W, kColTiles, kWarps, kChains, kStages, kTiles>;
  const int bytes = Memory::bytes(p.units) + (kPlace == Place::kShared ? p.m * Memory::x_pitch(p.units) : 0);
  const auto kernel = linear_kernel<W, kColTiles, kWarps, kChains, kPlace, kWhole, kEpilogue>;
  if (has_early_launch()) return launch_kernel_early(kernel, grid, threads, bytes, stream, p);
  return launch_kernel_with_shared(kernel, grid, threads, bytes, stream, p);
}

template <typename T>
bool aligned_rows(const Params<T>& p) {
  return aligned_to(p.x, 16) && (p.m == 1 || p.x_row_stride % 8 == 0);
}

// Whether a product normalizes x itself. It does it in every CTA, which pays for few rows; more are normalized once, by
// a kernel of its own. There must be room for the other CTA of a multiprocessor; then there is for the single one
// that has three row tiles.
template <typename W>
bool normalizes_itself(const Params<typename W::T>& p) {
  using Memory = Shared<W, 1, 8, 8, Tuning<W>::stages(Place::kShared, 1, 2), 2>;
  constexpr int kReserved = 1024;  // of each CTA
  const int bytes = Memory::bytes(p.units) + p.m * Memory::x_pitch(p.units) + kReserved;
  return p.m <= kSharedRows && p.k <= kShortK &&
         Tuning<W>::ctas_per_sm(Place::kShared, 1, 8, 2) * bytes <= shared_bytes_of_multiprocessor();
}

// A long K has 16 chains. With up to 8 rows each has a warp: there are few CTAs then (of a model's layers, those with a
// long K have few outputs), and many warps keep more of the memory's work under way.
template <typename W, bool kWhole, Epilogue kEpilogue>
cudaError_t launch_for_size(const Params<typename W::T>& p, int sm_count, cudaStream_t stream) {
  if (p.k > kShortK) {
    return p.m <= 8 ? launch<W, 1, Tuning<W>::kLongWarps, 16, Place::kStreamed, kWhole, kEpilogue>(p, sm_count, stream)
                    : launch<W, 2, 8, 16, Place::kStreamed, kWhole, kEpilogue>(p, sm_count, stream);
  }
  if constexpr (kEpilogue != Epilogue::kBias) {
    if (p.norm_weight) return launch<W, 1, 8, 8, Place::kShared, kWhole, kEpilogue>(p, sm_count, stream);
  }
  if constexpr (kWhole && Tuning<W>::kHoldFrom <= 8) {
    if (p.m >= Tuning<W>::kHoldFrom && p.m <= 8 && p.row_tiles > 4 * kRowTiles<kEpilogue> * sm_count) {
      return launch<W, 1, 8, 8, Place::kHeld, kWhole, kEpilogue>(p, sm_count, stream);
    }
  }
  if (p.m <= 8) return launch<W, 1, 8, 8, Place::kStreamed, kWhole, kEpilogue>(p, sm_count, stream);
  // x in registers is there at once or not at all; where each CTA has one block, waiting for little of it is faster.
  const bool hold = p.row_tiles > kRowTiles<kEpilogue> * sm_count || p.k <= kShortK / 2;
  constexpr Place kHeldIfWhole = kWhole ? Place::kHeld : Place::kStreamed;
  return kWhole && hold ? launch<W, 2, 8, 8, kHeldIfWhole, kWhole, kEpilogue>(p, sm_count, stream)
                        : launch<W, 2, 8, 8, Place::kStreamed, kWhole, kEpilogue>(p, sm_count, stream);
}

template <typename W, Epilogue kEpilogue>
cudaError_t launch_for_alignment(const Params<typename W::T>& p, int sm_count, cudaStream_t stream) {
  return aligned_rows(p) && p.k % W::kUnitCols == 0 ? launch_for_size<W, true, kEpilogue>(p, sm_count, stream)
                                                    : launch_for_size<W, false, kEpilogue>(p, sm_count, stream);
}

// The plain product, of x as it is.
template <typename W>
cudaError_t launch_plain(const Params<typename W::T>& p, int sm_count, cudaStream_t stream) {
  return launch_for_alignment<W, Epilogue::kBias>(p, sm_count, stream);
}

// A fused product: of x's RMSNorm where there is a norm_weight and normalizes_itself().
template <typename W, Epilogue kEpilogue>
cudaError_t launch_fused(const Params<typename W::T>& p, int sm_count, cudaStream_t stream) {
  if (!aligned_rows(p)) return cudaErrorMisalignedAddress;
  if (p.norm_weight && !normalizes_itself<W>(p)) return cudaErrorInvalidValue;
  return launch_for_alignment<W, kEpilogue>(p, sm_count, stream);
}

// A fused product, behind its norm where that is `apart`: a kernel of its own.
template <typename Args, typename Launch>
cudaError_t launch_behind_norm(Args args, bool apart, Dtype dtype, cudaStream_t stream, const Launch& launch) {
  if (args.norm_weight && !aligned_to(args.norm_weight, 16)) return cudaErrorMisalignedAddress;
  if (!apart) return launch(args);
  if (!aligned_to(args.x, 16) || (args.m > 1 && args.x_row_stride % 8)) return cudaErrorMisalignedAddress;
  const RmsNormArgs norm{args.x, args.x_row_stride, args.norm_weight, args.eps, args.normalized, args.m, args.k};
  const cudaError_t error = launch_rms_norm(norm, dtype, stream);
  if (error != cudaSuccess) return error;
  args.x = args.normalized;
  args.x_row_stride = args.k;
  args.norm_weight = nullptr;
  return launch(args);
}

}  // namespace hf_fastpath::linear
