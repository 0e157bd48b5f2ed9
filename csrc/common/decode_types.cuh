// What the parts of decode_linear.cuh share.
#pragma once

#include <algorithm>

#include "../kernels.h"
#include "dequant.cuh"
#include "memory.cuh"
#include "ptx.cuh"
#include "reduce.cuh"

namespace hf_fastpath::linear {

constexpr int kRowTiles = 2;       // of a block
constexpr int kPartialPitch = 20;  // floats from one row of x to the next in shared memory; 20 avoids bank conflicts

// What becomes of the sums of products. kSwiGlu: a CTA takes tile r of the weight's first half (gate) together with
// tile r of its second half (up).
enum class Epilogue { kBias, kResidual, kSwiGlu };

template <typename T>
struct Params {
  const T* x;
  int64_t x_row_stride;
  const uint4* qweight;
  const uint16_t* scales;
  const uint8_t* zeros;
  const T* bias;
  T* y;
  int m, n, k;
  int row_tiles, col_tiles, units;
  const T* residual;     // (m, n), with Epilogue::kResidual; or nullptr
  const T* norm_weight;  // (k,), with kNorm
  float eps;
};

// Row tiles that a block takes of the weight; with kSwiGlu, of each half of it.
template <Epilogue kEpilogue>
constexpr int kBlockRows = kEpilogue == Epilogue::kSwiGlu ? kRowTiles / 2 : kRowTiles;

// The B fragments of one unit: rows g (and g + 8) of x, 8 columns of each 32.
template <int kColTiles, int kUnitCols>
struct Activations {
  uint4 half_tile[kColTiles][kUnitCols / 32];
};

}  // namespace hf_fastpath::linear
