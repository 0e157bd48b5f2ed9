// Decode attention: a warp's running softmax and output.
//
// A lane l = 4 * g + t has scores of the query heads 2t and 2t + 1. Weights are rounded to 16 bits for the tensor
// cores: a token's is multiplied by the scale of its value and by 2^14 over a power of two not below any scale so far
// (`exponent`), so that it is below 2^15, and fp16 keeps 11 bits of weights down to 2^-29 of the largest possible.
#pragma once

#include "../common/dtype.cuh"
#include "../common/reduce.cuh"
#include "work.cuh"

namespace hf_fastpath::attn {

constexpr float kMinusInfinity = -__builtin_huge_valf();
constexpr float kLog2E = 1.4426950408889634f;
constexpr int kLeastExponent = 15;  // so that weight_unit() and its inverse are normal numbers
constexpr int kOneExponent = 127;   // of the scale 1

__device__ __forceinline__ float float_of_exponent(int biased) {
  return __uint_as_float(static_cast<uint32_t>(biased) << 23);
}
// What weights are multiplied by: 2^14 / 2^(exponent - 127); and the inverse.
__device__ __forceinline__ float weight_unit(int exponent) {
  return float_of_exponent(268 - exponent);
}
__device__ __forceinline__ float inverse_weight_unit(int exponent) {
  return float_of_exponent(exponent - 14);
}
// The biased exponent of a scale >= 0 in fp32: the scale is less than twice the power of two.
__device__ __forceinline__ int exponent_of(float scale) {
  return max(static_cast<int>(__float_as_uint(scale) >> 23), kLeastExponent);
}

// kBlocks: of 64 channels. Output tile [b][j] has rows g and g + 8: channels 8g + 2j and 8g + 2j + 1 of block b.
template <int kBlocks, bool kMinima>
struct Running {
  float max[2] = {kMinusInfinity, kMinusInfinity};  // of the scores so far, in log2 units
  float sum[2] = {};                                // of this lane's weights, relative to the maximum
  int exponent = kLeastExponent;
  float out[kBlocks][4][4] = {};                // in units of weight_unit()
  float minima[kMinima ? kBlocks : 1][2] = {};  // int4: this lane's weights times the tokens' minima
};

// The maximum and sum with new scores in them, which become weights; `rescale` is what earlier weights are worth now.
// Scores: [m][2h + j] of token row g + 8h of tile m and the lane's head j.
template <int kTiles, int kBlocks, bool kMinima>
__device__ __forceinline__ void update_softmax(Running<kBlocks, kMinima>& r, float (&scores)[kTiles][4],
                                               float (&rescale)[2]) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    float largest = fmaxf(scores[0][j], scores[0][j + 2]);
#pragma unroll
    for (int m = 1; m < kTiles; ++m) largest = fmaxf(largest, fmaxf(scores[m][j], scores[m][j + 2]));
    const float new_max = fmaxf(r.max[j], max_over_g(largest));
    const float finite_max = new_max == kMinusInfinity ? 0.0f : new_max;  // all masked so far: exp2(-inf) = 0
    rescale[j] = exp2_fast(r.max[j] - finite_max);
    r.max[j] = new_max;
    float sum = 0.0f;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) sum += scores[m][2 * h + j] = exp2_fast(scores[m][2 * h + j] - finite_max);
    }
    r.sum[j] = r.sum[j] * rescale[j] + sum;
    if constexpr (kMinima) {
#pragma unroll
      for (auto& minimum : r.minima) minimum[j] *= rescale[j];
    }
  }
}

// Makes the output what it is relative to the new maximum and to a scale of exponent `least` or more; returns
// weight_unit().
template <int kBlocks, bool kMinima>
__device__ __forceinline__ float rescale_output(Running<kBlocks, kMinima>& r, const float (&rescale)[2], int least) {
  const int exponent = max(r.exponent, least);
  // 2^-127 and less: nothing but zeros was added so far, or what was is nothing beside what comes.
  const float shift = float_of_exponent(max(127 - (exponent - r.exponent), 0));
  r.exponent = exponent;
  const float factor[2] = {rescale[0] * shift, rescale[1] * shift};
  if (__any_sync(kFullWarp, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
    for (auto& block : r.out) {
#pragma unroll
      for (auto& tile : block) {
#pragma unroll
        for (int i = 0; i < 4; ++i) tile[i] *= factor[i % 2];
      }
    }
  }
  return weight_unit(exponent);
}

// tanh(x) to 2^-22, absolute.
__device__ __forceinline__ float tanh_fast(float x) {
  return 1.0f - 2.0f * __frcp_rn(1.0f + exp2_fast(2.0f * kLog2E * x));
}

// From products of query and key, in what `factor` makes natural units over softcap, or log2 units without a softcap,
// to scores in log2 units; minus infinity where the bit of the token is not set.
template <typename F>
__device__ __forceinline__ void finish_scores(float (&scores)[F::kTiles][4], const float (&factor)[2], float softcap,
                                              uint32_t present, int g) {
#pragma unroll
  for (int m = 0; m < F::kTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[m][i] *= factor[i % 2];
  }
  if (softcap > 0.0f) {
#pragma unroll
    for (int m = 0; m < F::kTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[m][i] = softcap * kLog2E * tanh_fast(scores[m][i]);
    }
  }
  if (present != F::kAllPresent) {
#pragma unroll
    for (int m = 0; m < F::kTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (!(present >> F::token(m, g, i / 2) & 1)) scores[m][i] = kMinusInfinity;
      }
    }
  }
}

}  // namespace hf_fastpath::attn
