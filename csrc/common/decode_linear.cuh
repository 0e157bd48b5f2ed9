// y = x @ W.T for 1..16 rows of x: what the kernels for packed weights share.
//
// The weights are the A operand of mma.m16n8k16, so a tile of 16 outputs meets 8 rows of x in one instruction and the
// tensor core is no slower for 8 rows than for 1. A CTA takes blocks of kRowTiles tiles of 16 outputs; its warps split
// K in units of W::kUnitCols columns, unit u going to warp u % kWarps, and the partial sums are added in the order of
// the warps. Neither the split nor the order depends on the number of rows, so a row's bits do not either.
//
// More than 8 rows of x are a larger traffic than the weights, and stay in shared memory where they fit.
//
// Weights come through shared memory: every warp has a ring of kStages units of its own, which it fills and empties
// without meeting the other warps. The first units are asked for before the kernel waits for the one before it
// (programmatic dependent launch), so that the memory does not rest between kernels.
//
// A weight format W (int4_weights.cuh, w8a16_linear.cu) has: T, kUnitCols, kGroups (those of a unit whose sums of x it
// wants, times kSumFactor; 0: none), kRowScales (one scale an output, applied at the end), Stage (a unit in shared
// memory), Source (which fills it) and multiply().
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

// kWhole (see launch()): rows are aligned to 16 bytes and units are whole; an empty unit is the last one once more.
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

// The sums of x over each group of a unit, times a factor, for this lane's columns 2t and 2t + 1 of the C fragment.
template <int kGroups, int kColTiles>
struct GroupSums {
  float2 value[kGroups][kColTiles];

  // The tensor core adds: A is ones.
  template <typename T, int kUnitCols>
  __device__ __forceinline__ void compute(const Activations<kColTiles, kUnitCols>& x, float factor) {
    constexpr uint32_t kAllOnes[4] = {kOnes<T>, kOnes<T>, kOnes<T>, kOnes<T>};
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

// The shared memory of a CTA: the rings of its warps, partial sums, the groups' sums of x of all units, and x itself.
template <typename W, int kColTiles>
struct Shared {
  using Stage = typename W::Stage;
  static constexpr int kPartialFloats = kWarps * kRowTiles * 8 * kColTiles * kPartialPitch;
  static constexpr int kUnitFloats = W::kGroups * 8 * kColTiles;
  static constexpr int kUnitX = kColTiles * (W::kUnitCols / 32) * 32;  // 16 bytes each

  static int bytes(int units, bool shared_x) {
    const int padded = (units + kWarps - 1) / kWarps * kWarps;
    const int floats = kPartialFloats + padded * kUnitFloats;
    return static_cast<int>(kWarps * kStages * sizeof(Stage)) + 4 * floats + (shared_x ? padded * kUnitX * 16 : 0);
  }
  static __device__ __forceinline__ Stage* ring(int warp) {
    return reinterpret_cast<Stage*>(dynamic_shared()) + warp * kStages;
  }
  static __device__ __forceinline__ float* partial() { return reinterpret_cast<float*>(ring(kWarps)); }
  static __device__ __forceinline__ float* group_sums(int unit) {
    return partial() + kPartialFloats + unit * kUnitFloats;
  }
  // This lane's 16 bytes of the first half tile of a unit of x, the others 32 further each.
  static __device__ __forceinline__ uint4* x(int padded_units, int unit, int lane) {
    return reinterpret_cast<uint4*>(group_sums(padded_units)) + unit * kUnitX + lane;
  }
};

// A unit of x to shared memory; each lane copies what it will read itself. An empty unit is the last one once more.
// Rows that are not there become 0: read by every lane of every CTA, the last row alone would keep the L2 busy.
template <int kUnitCols, typename T, int kColTiles>
__device__ __forceinline__ void copy_activations(uint4* target, const Params<T>& p, const Rows<T, kColTiles>& rows,
                                                 int unit, int lane) {
  constexpr int kHalves = kUnitCols / 32;
  const unsigned column = min(unit, p.units - 1) * kUnitCols;
#pragma unroll
  for (int i = 0; i < kColTiles * kHalves; ++i) {
    const bool there = lane / 4 + 8 * (i / kHalves) < p.m;
    cp_async16(target + 32 * i, rows.begin[i / kHalves] + column + i % kHalves * 32, there);
  }
}

// With more than 8 rows of x a thread wants more than 128 registers, or the CTA all shared memory.
template <int kColTiles>
constexpr int kCtasPerSm = kColTiles == 1 ? 2 : 1;

template <typename W, int kColTiles, bool kSharedX, bool kWhole, Epilogue kEpilogue, bool kNorm>
__global__ void __launch_bounds__(kThreads, kCtasPerSm<kColTiles>) linear_kernel(const Params<typename W::T> p) {
  using T = typename W::T;
  using Memory = Shared<W, kColTiles>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  typename Memory::Stage* const ring = Memory::ring(warp);
  const int padded_units = (p.units + kWarps - 1) / kWarps * kWarps;
  const RowRange<kEpilogue> range(p.row_tiles);
  int row_tile = range.first;
  Cursor<kEpilogue> now{warp, range.count, false}, ahead = now;
  typename W::template Source<kEpilogue, kWhole> source(p, row_tile, padded_units, lane);
  const Rows<T, kColTiles> rows(p, lane);
  int left = (range.count + kBlockRows<kEpilogue> - 1) / kBlockRows<kEpilogue> * (padded_units / kWarps);
  int to_copy = left;
  bool x_is_there = false;
  const auto copy = [&](typename Memory::Stage* stage) {
    if (to_copy > 0) source.copy(*stage, p, ahead, lane);
    if (kSharedX && x_is_there && ahead.rows_left == range.count) {
      copy_activations<W::kUnitCols>(Memory::x(padded_units, ahead.unit, lane), p, rows, ahead.unit, lane);
    }
    cp_async_commit();
    --to_copy;
    ahead.advance(padded_units);
    source.advance(ahead.wrapped);
  };
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) copy(ring + s);
  wait_for_previous_kernel();
  x_is_there = true;

  constexpr int kXs = kSharedX ? 1 : 2;
  Activations<kColTiles, W::kUnitCols> x[kXs];
  if constexpr (kSharedX) {
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
      const int unit = warp + s * kWarps;
      if (unit < padded_units) {
        copy_activations<W::kUnitCols>(Memory::x(padded_units, unit, lane), p, rows, unit, lane);
      }
      cp_async_commit();
    }
  } else {
    load_activations<kWhole>(x[0], p, rows, now.unit);
  }
  let_next_kernel_begin();
  [[maybe_unused]] float inverse[kColTiles];
  if constexpr (kNorm) inverse_rms(inverse, p);
  float acc[kRowTiles][kColTiles][4] = {};
  typename Memory::Stage *stage = ring, *last_read = ring + kStages - 1;
  while (left > 0) {
#pragma unroll
    for (int d = 0; d < kXs; ++d) {
      if (left <= 0) continue;  // not `break`: a loop with a second exit is not unrolled around a barrier
      const int unit = now.unit, rows_left = now.rows_left;
      now.advance(padded_units);
      if constexpr (!kSharedX) load_activations<kWhole>(x[1 - d], p, rows, now.unit);
      cp_async_wait<kStages - 2>();
      __syncwarp();  // all lanes' copies are there, and all have read the stage that is filled now
      if constexpr (kSharedX) x[d].read(Memory::x(padded_units, unit, lane));
      copy(last_read);
      if constexpr (kNorm) normalize(x[d], p, inverse, unit, lane);
      GroupSums<W::kGroups, kColTiles> sums;
      if constexpr (W::kGroups > 0) {
        float* kept = Memory::group_sums(unit);
        if (rows_left == range.count) {
          sums.template compute<T>(x[d], W::kSumFactor);
          sums.keep(kept, lane);
        } else {
          sums.read(kept, lane);
        }
      }
      // The last unit once more is not counted: it was loaded with scales of 0, or has none.
      if (!kWhole || !W::kRowScales || unit < p.units) {
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) W::multiply(acc[r], *stage, r, x[d], sums, lane);
      }
      last_read = stage;
      stage = stage == ring + kStages - 1 ? ring : stage + 1;
      if (now.wrapped) {
        finish_block<W, kEpilogue>(acc, Memory::partial(), p, row_tile, rows_left);
        row_tile += kBlockRows<kEpilogue>;
        clear(acc);
      }
      --left;
    }
  }
}

// kWhole: rows of x start at multiples of 16 bytes, and units are whole, so that nothing has to be checked for each
// load of x.
template <typename W, int kColTiles, bool kSharedX, bool kWhole, Epilogue kEpilogue, bool kNorm>
cudaError_t launch(const Params<typename W::T>& p, int sm_count, cudaStream_t stream) {
  const int blocks = (p.row_tiles + kRowTiles - 1) / kRowTiles;
  const int grid = std::min(blocks, kCtasPerSm<kColTiles> * sm_count);
  const int bytes = Shared<W, kColTiles>::bytes(p.units, kSharedX);
  const auto kernel = linear_kernel<W, kColTiles, kSharedX, kWhole, kEpilogue, kNorm>;
  if (has_early_launch()) return launch_kernel_early(kernel, grid, kThreads, bytes, stream, p);
  return launch_kernel_with_shared(kernel, grid, kThreads, bytes, stream, p);
}

template <typename T>
bool aligned_rows(const Params<T>& p) {
  return aligned_to(p.x, 16) && (p.m == 1 || p.x_row_stride % 8 == 0);
}

template <typename W, Epilogue kEpilogue, bool kNorm>
cudaError_t launch_for_size(const Params<typename W::T>& p, int sm_count, cudaStream_t stream) {
  const bool whole = aligned_rows(p) && p.k % W::kUnitCols == 0;
  if (p.m <= 8) {
    return whole ? launch<W, 1, false, true, kEpilogue, kNorm>(p, sm_count, stream)
                 : launch<W, 1, false, false, kEpilogue, kNorm>(p, sm_count, stream);
  }
  if (!whole) return launch<W, 2, false, false, kEpilogue, kNorm>(p, sm_count, stream);
  const bool fits = Shared<W, 2>::bytes(p.units, true) <= max_shared_bytes();
  return fits ? launch<W, 2, true, true, kEpilogue, kNorm>(p, sm_count, stream)
              : launch<W, 2, false, true, kEpilogue, kNorm>(p, sm_count, stream);
}

// The plain product, of x as it is.
template <typename W>
cudaError_t launch_plain(const Params<typename W::T>& p, int sm_count, cudaStream_t stream) {
  return launch_for_size<W, Epilogue::kBias, false>(p, sm_count, stream);
}

// A fused product: of x's RMSNorm where there is a norm_weight.
template <typename W, Epilogue kEpilogue>
cudaError_t launch_fused(const Params<typename W::T>& p, int sm_count, cudaStream_t stream) {
  if (!aligned_rows(p) || (p.norm_weight && !aligned_to(p.norm_weight, 16))) return cudaErrorMisalignedAddress;
  return p.norm_weight ? launch_for_size<W, kEpilogue, true>(p, sm_count, stream)
                       : launch_for_size<W, kEpilogue, false>(p, sm_count, stream);
}

}  // namespace hf_fastpath::linear
