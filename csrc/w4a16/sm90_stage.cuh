// The ring of w4a16_gemm_sm90.cu: what a stage holds, and the warp that fills it.
#pragma once

#include "../common/memory.cuh"
#include "../common/ptx_sm90.cuh"
#include "gemm.cuh"
#include "schedule.cuh"

namespace hf_fastpath {

// A value that all lanes of a warp have, in a way that the compiler sees: what depends on it then takes registers and
// instructions of the warp instead of each lane's.
__device__ __forceinline__ int uniform(int value) {
  return __shfl_sync(0xffffffffu, value, 0);
}

// Packed tiles, of 64 columns each, that a stage holds. Many tokens leave no room for a unit's two.
template <int kTokenTiles>
constexpr int kColTiles = kTokenTiles <= 8 ? 2 : 1;
constexpr int kColTileBytes = 128;  // of a row of x

// A ninth warp is the third of its scheduler, whose registers are shared equally at the start: 168 for each thread.
// Where accumulators need more, the producer has three idle companions, and the four give away what they do not need.
template <int kCtasPerSm>
constexpr bool kMovesRegisters = kCtasPerSm == 1;
template <int kCtasPerSm>
constexpr int kSm90Threads = kGemmThreads + (kMovesRegisters<kCtasPerSm> ? 128 : 32);
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

template <typename T>
struct Sm90Operands {
  GemmParams<T> gemm;
  TensorMap x, weights, scales, zeros;
  bool x_mapped;  // else x is loaded by ordinary instructions
};

// Of a weight of two parts, gate and up: a tile is the same 64 outputs of both, the first four warps' and the others'.
struct PairedSchedule : ClusterSchedule {
  static constexpr bool kPaired = true;
};

// Where a tile begins: in the weight's tiles of rows, in the rows of x. Another schedule than ClusterSchedule has an
// overload of its own.
struct Corner {
  int row_tile, token;
};
template <int kTokenTiles>
__device__ __forceinline__ Corner corner_of(const ClusterSchedule& s, int tile) {
  const Place place = s.place(tile);
  return {place.row_block * kGemmWarps, place.token_block * 8 * kTokenTiles};
}
template <int kTokenTiles>
__device__ __forceinline__ Corner corner_of(const PairedSchedule& s, int tile) {
  const Place place = s.place(tile);
  return {place.row_block * (kGemmWarps / 2), place.token_block * 8 * kTokenTiles};
}

template <typename T, typename Schedule>
struct Sm90Params : Sm90Operands<T> {
  Schedule schedule;
  TensorMap y;
  bool y_mapped;  // else y is stored by ordinary instructions
};

// Everything as it is in global memory: all of it arrives by the engine that copies boxes of matrices.
template <int kGroup, int kTokenTiles>
struct __align__(1024) Sm90Stage {
  static constexpr int kTiles = kColTiles<kTokenTiles>, kCols = 64 * kTiles;
  static constexpr int kGroups = kGroup < kCols ? kCols / kGroup : 1;
  unsigned char x[kTiles][8 * kTokenTiles][kColTileBytes];  // B operands of wgmma_descriptor()
  uint4 weights[kGemmWarps][kTiles][32];
  uint16_t scales[kGemmWarps][kGroups][16];
  uint8_t zeros[kGemmWarps][kGroups][16];
};

// Arrivals that fill a stage: one that tells how much of the weights to wait for, one for x.
constexpr int kFillArrivals = 2;

// A CTA's way through the stages of its tiles.
struct StageCursor {
  int tile, step;
  int begin, end;  // the steps, stages along K, of each tile

  template <typename Schedule>
  __device__ __forceinline__ StageCursor(const Schedule& s, int cta, int steps_of_unit)
      : tile(cta / s.splits),
        begin(steps_of_unit * s.begin(cta % s.splits)),
        end(steps_of_unit * s.begin(cta % s.splits + 1)) {
    step = begin;
  }
  template <typename Schedule>
  __device__ __forceinline__ bool done(const Schedule& s) const {
    return tile >= s.count();
  }
  // Returns whether that leads to another tile.
  template <typename Schedule>
  __device__ __forceinline__ bool advance(const Schedule& s) {
    if (++step < end) return false;
    step = begin;
    tile += s.clusters;
    return true;
  }
};

// One thread's work.
template <typename T>
__device__ __forceinline__ void prefetch_maps(const Sm90Operands<T>& params) {
  prefetch_map(params.weights);
  prefetch_map(params.scales);
  if (params.gemm.zeros) prefetch_map(params.zeros);
  if (params.x_mapped) prefetch_map(params.x);
}

// One thread's work. Beyond the last row or column of tiles the engine writes zeros.
template <bool kPaired, typename T, int kGroup, int kTokenTiles>
__device__ __forceinline__ void load_weights(Sm90Stage<kGroup, kTokenTiles>& stage, uint64_t* full,
                                             const Sm90Operands<T>& params, int first_tile, int step) {
  using Stage = Sm90Stage<kGroup, kTokenTiles>;
  const bool has_zeros = params.gemm.zeros != nullptr;
  const int group = step * Stage::kCols / kGroup;
  mbarrier_arrive_expecting(full, static_cast<int>(sizeof stage.weights + sizeof stage.scales) +
                                      (has_zeros ? static_cast<int>(sizeof stage.zeros) : 0));
  const auto load = [&](void* target, const TensorMap& map, int column) {
    if constexpr (kPaired) {
      tensor_load_parts(target, map, first_tile, column, full);
    } else {
      tensor_load(target, map, first_tile, column, full);
    }
  };
  load(stage.weights, params.weights, step * Stage::kTiles * 128);
  load(stage.scales, params.scales, group * 8);
  if (has_zeros) load(stage.zeros, params.zeros, group * 4);
}

// x of a stage without a map: rows that do not start at multiples of 16 bytes. The same bytes at the same places.
template <int kTokenTiles, typename T>
__device__ __forceinline__ void store_x(unsigned char (&x)[8 * kTokenTiles][kColTileBytes], const GemmParams<T>& p,
                                        int first_token, int first_col, int lane) {
  const int chunk = lane % 8, col = first_col + chunk * 8;
  for (int token = lane / 8; token < 8 * kTokenTiles; token += 4) {
    const int64_t row = first_token + token;
    uint4 values = make_uint4(0, 0, 0, 0);
    if (row < p.m && col < p.k) values = load_8x16bit<false>(p.x + row * p.x_row_stride + col);
    *reinterpret_cast<uint4*>(&x[token][(chunk ^ token % 8) * 16]) = values;
  }
  fence_proxy_async();
}

template <typename T, int kGroup, int kTokenTiles>
__device__ __forceinline__ void load_x(Sm90Stage<kGroup, kTokenTiles>& stage, uint64_t* full,
                                       const Sm90Operands<T>& params, int first_token, int step, int lane) {
  using Stage = Sm90Stage<kGroup, kTokenTiles>;
  const int column = step * Stage::kCols;
  if (params.x_mapped) {
    if (lane) return;
    mbarrier_arrive_expecting(full, sizeof stage.x);
#pragma unroll
    for (int i = 0; i < Stage::kTiles; ++i) tensor_load(stage.x[i], params.x, first_token, column + 64 * i, full);
    return;
  }
#pragma unroll
  for (int i = 0; i < Stage::kTiles; ++i) {
    store_x<kTokenTiles>(stage.x[i], params.gemm, first_token, column + 64 * i, lane);
  }
  __syncwarp();
  if (lane == 0) mbarrier_arrive(full);
}

// One warp's work. The weights of the first stages are asked for while the kernel before this one may still run.
template <typename T, int kGroup, int kTokenTiles, int kStages, typename Schedule>
__device__ __forceinline__ void produce(Sm90Stage<kGroup, kTokenTiles>* stages, uint64_t* full, uint64_t* empty,
                                        const Sm90Operands<T>& params, const Schedule& s, int cta, int lane) {
  StageCursor now(s, cta, 2 / kColTiles<kTokenTiles>);
  if (lane == 0) {
    StageCursor ahead = now;
    for (int stage = 0; stage < kStages && !ahead.done(s); ++stage) {
      const int row_tile = corner_of<kTokenTiles>(s, ahead.tile).row_tile;
      load_weights<Schedule::kPaired, T>(stages[stage], full + stage, params, row_tile, ahead.step);
      ahead.advance(s);
    }
  }
  wait_for_previous_kernel();
  let_next_kernel_begin();
  Corner corner = {};
  if (!now.done(s)) corner = corner_of<kTokenTiles>(s, now.tile);
  int stage = 0, phase = 0;
  bool first_round = true;
  while (!now.done(s)) {
    if (!first_round) {
      mbarrier_wait(empty + stage, phase ^ 1);
      if (lane == 0) {
        load_weights<Schedule::kPaired, T>(stages[stage], full + stage, params, corner.row_tile, now.step);
      }
    }
    load_x<T>(stages[stage], full + stage, params, corner.token, now.step, lane);
    if (++stage == kStages) stage = 0, phase ^= 1, first_round = false;
    if (now.advance(s) && !now.done(s)) corner = corner_of<kTokenTiles>(s, now.tile);
  }
  __syncwarp();
}

}  // namespace hf_fastpath
