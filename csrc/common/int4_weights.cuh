// Packed int4 weights (hf_fastpath/packing.py) as a weight format of decode_linear.cuh.
//
// The tensor core multiplies the codes q as they stand in their words (Nibbles), which takes five instructions a word
// in bf16; -zero times the group's sum of x is where the group's sum starts. All of it is exact but for the sums, which
// are fp32, and the group's sum is multiplied by its scale in fp32: the scaled weight is never rounded to 16 bits,
// unlike in w4a16_dequantize.
#pragma once

#include "decode_linear.cuh"

namespace hf_fastpath::linear {

template <typename T_, int kGroup, bool kZeros>
struct Int4Weights {
  using T = T_;
  using Codes = Nibbles<T>;
  static constexpr int kUnitCols = 128;  // one group of the largest size: two tiles
  static constexpr bool kRowScales = false, kHasZeros = kZeros, kWideOutput = false;
  static constexpr int kGroups = kUnitCols / kGroup;
  static constexpr float kSumFactor = (kZeros ? -1.0f : -8.0f) / Codes::kOnesCount;

  // Eight values of x, as multiply() wants them.
  static __device__ __forceinline__ uint4 prepared(const uint4& x) {
    return make_uint4(Codes::prepared(x.x), Codes::prepared(x.y), Codes::prepared(x.z), Codes::prepared(x.w));
  }

  template <int kTiles>
  struct StageOf {
    uint4 tile[kTiles][2][32];
    uint16_t scales[kTiles][kGroups][16];
    uint8_t zeros[kZeros ? kTiles : 1][kZeros ? kGroups : 1][16];
  };

  template <Epilogue kEpilogue, bool kWhole, int kWarps>
  class Source {
   public:
    __device__ __forceinline__ Source(const Params<T>& p, int first_row_tile, int padded_units, int lane)
        : groups_(p.k / kGroup),
          tiles_(p, first_row_tile, padded_units, lane),
          scales_(p.scales, p, groups_, first_row_tile, padded_units, lane),
          zeros_(p.zeros, p, groups_, first_row_tile, padded_units, lane) {}
    __device__ __forceinline__ void copy(StageOf<kRowTiles<kEpilogue>>& stage, const Params<T>& p,
                                         const Cursor<kEpilogue, kWarps>& at, int lane) const {
      tiles_.copy(stage.tile, p, at, lane);
      scales_.copy(&stage.scales[0][0][0], groups_, at, lane);
      if constexpr (kZeros) zeros_.copy(&stage.zeros[0][0][0], groups_, at, lane);
    }
    __device__ __forceinline__ void advance(bool wrapped) {
      tiles_.advance(wrapped);
      scales_.advance(wrapped);
      if constexpr (kZeros) zeros_.advance(wrapped);
    }

   private:
    int groups_;
    TileSource<kEpilogue, kWhole, kWarps> tiles_;
    ValueSource<uint16_t, kGroups, kEpilogue, kWhole, kWarps> scales_;
    ValueSource<uint8_t, kGroups, kEpilogue, kWhole, kWarps> zeros_;
  };

  // acc += scale * (the unit's products), for row tile r.
  template <int kColTiles, int kTiles>
  static __device__ __forceinline__ void multiply(float (&acc)[kColTiles][4], const StageOf<kTiles>& stage, int r,
                                                  const Activations<kColTiles, kUnitCols>& x,
                                                  const GroupSums<kGroups, kColTiles>& sums, int lane) {
    constexpr int kWords = 8 / kGroups, kHigh = Codes::kRowHigh;
    const int g = lane / 4;
    const uint4 tile[2] = {stage.tile[r][0][lane], stage.tile[r][1][lane]};
    const uint32_t words[8] = {tile[0].x, tile[0].y, tile[0].z, tile[0].w, tile[1].x, tile[1].y, tile[1].z, tile[1].w};
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const float zero_lo = kZeros ? zero_as_float<1>(stage.zeros[r][group][g]) : 1.0f;
      const float zero_hi = kZeros ? zero_as_float<kHigh>(stage.zeros[r][group][g + 8]) : kHigh;
      float sum[kColTiles][4];
#pragma unroll
      for (int c = 0; c < kColTiles; ++c) {
        const float2 start = sums.value[group][c];
        sum[c][0] = zero_lo * start.x, sum[c][1] = zero_lo * start.y;
        sum[c][2] = zero_hi * start.x, sum[c][3] = zero_hi * start.y;
      }
#pragma unroll
      for (int i = group * kWords; i < (group + 1) * kWords; ++i) {
        uint32_t a[4];
        Codes::fragment(words[i], a);
#pragma unroll
        for (int c = 0; c < kColTiles; ++c) {
          const uint4& b = x.half_tile[c][i / 2];
          mma_m16n8k16<T>(sum[c], a, i % 2 ? b.z : b.x, i % 2 ? b.w : b.y);
        }
      }
      const float scale_lo = Codes::kUnit * bits_to_float<T>(stage.scales[r][group][g]);
      const float scale_hi = Codes::kUnit / kHigh * bits_to_float<T>(stage.scales[r][group][g + 8]);
#pragma unroll
      for (int c = 0; c < kColTiles; ++c) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[c][i] = fmaf(sum[c][i], i < 2 ? scale_lo : scale_hi, acc[c][i]);
      }
    }
  }
};

template <typename T>
Params<T> int4_params(const W4A16LinearArgs& a) {
  Params<T> p = {};
  p.x = static_cast<const T*>(a.x);
  p.x_row_stride = a.x_row_stride;
  p.qweight = static_cast<const uint4*>(a.qweight);
  p.scales = static_cast<const uint16_t*>(a.scales);
  p.zeros = a.zeros;
  p.bias = static_cast<const T*>(a.bias);
  p.y = static_cast<T*>(a.y);
  p.m = a.m, p.n = a.n, p.k = a.k;
  p.row_tiles = (a.n + 15) / 16;
  p.col_tiles = (a.k + 63) / 64;
  p.units = (a.k + 127) / 128;
  p.residual = static_cast<const T*>(a.residual);
  p.norm_weight = static_cast<const T*>(a.norm_weight);
  p.eps = a.eps;
  return p;
}

// Calls `launcher` with the weight format as the type of its argument.
template <typename T, typename Launcher>
auto for_int4_format(int group_size, bool zeros, Launcher launcher) {
  if (group_size == 32) return zeros ? launcher(Int4Weights<T, 32, true>()) : launcher(Int4Weights<T, 32, false>());
  if (group_size == 64) return zeros ? launcher(Int4Weights<T, 64, true>()) : launcher(Int4Weights<T, 64, false>());
  return zeros ? launcher(Int4Weights<T, 128, true>()) : launcher(Int4Weights<T, 128, false>());
}

}  // namespace hf_fastpath::linear
