// What the parts of decode_linear.cuh share.
#pragma once

#include <algorithm>

#include "../kernels.h"
#include "dequant.cuh"
#include "memory.cuh"
#include "ptx.cuh"
#include "reduce.cuh"

namespace hf_fastpath::linear {

constexpr int kPartialPitch = 20;  // floats from one row of x to the next in shared memory; 20 avoids bank conflicts

// What becomes of the sums of products. With kSwiGlu the weight has two parts (gate, up), with kShortConv three (B, C,
// x), and a CTA takes tile r of all of them together.
enum class Epilogue { kBias, kResidual, kSwiGlu, kShortConv };

template <Epilogue kEpilogue>
constexpr int kParts = kEpilogue == Epilogue::kSwiGlu      ? 2
                       : kEpilogue == Epilogue::kShortConv ? 3
                                                           : 1;
template <Epilogue kEpilogue>
constexpr int kRowTiles = kEpilogue == Epilogue::kShortConv ? 3 : 2;  // of a block
// Row tiles that a block takes of each part.
template <Epilogue kEpilogue>
constexpr int kBlockRows = kRowTiles<kEpilogue> / kParts<kEpilogue>;

// The convolution that follows, of kShortConv: see ShortConvArgs in kernels.h.
template <typename T>
struct ConvParams {
  T* state;
  const T* weight;
  const T* bias;
  const uint8_t* mask;  // (m,)
  int64_t mask_stride;
  int taps;
};

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
  ConvParams<T> conv;
  const T* weight;  // (n, k), of 16-bit weights (weights_16bit.cuh), which have neither qweight nor scales nor zeros
  float* wide_y;    // with W::kWideOutput: where the result goes, rounded to T all the same, instead of y; or nullptr
};

// The B fragments of one unit: rows g (and g + 8) of x, 8 columns of each 32.
template <int kColTiles, int kUnitCols>
struct Activations {
  uint4 half_tile[kColTiles][kUnitCols / 32];
};

}  // namespace hf_fastpath::linear
