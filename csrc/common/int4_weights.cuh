// Packed int4 weights (hf_fastpath/packing.py) as a weight format of decode_linear.cuh.
//
// q - zero is exact in 16 bits, products and sums of a group are fp32, and the group's sum is multiplied by its scale
// in fp32: the scaled weight is never rounded to 16 bits, unlike in w4a16_dequantize.
#pragma once

#include "decode_linear.cuh"
#include "dequant.cuh"

namespace hf_fastpath::linear {

// A lane's share of kCount consecutive per-group values from index `first`, of which `valid` exist (all with kWhole):
// two neighbours when there are 64, else one.
template <bool kWhole, int kCount, typename V>
__device__ __forceinline__ uint32_t load_group_values(const V* values, unsigned first, int valid, int lane) {
  if constexpr (kCount == 64) {
    if (!kWhole && 2 * lane >= valid) return 0;
    const V* p = values + first + 2 * lane;
    if constexpr (sizeof(V) == 2) return __ldg(reinterpret_cast<const uint32_t*>(p));
    const uint32_t both = __ldg(reinterpret_cast<const uint16_t*>(p));
    return (both & 0xff) | ((both & 0xff00) << 8);
  } else {
    const int index = lane % kCount;
    return kWhole || index < valid ? __ldg(values + first + index) : 0;
  }
}

// The value of index `index` out of a share loaded by load_group_values.
template <int kCount>
__device__ __forceinline__ uint32_t group_value(uint32_t share, int index) {
  if constexpr (kCount == 64) {
    const uint32_t both = __shfl_sync(kFullWarp, share, index / 2);
    return index % 2 ? both >> 16 : both & 0xffff;
  } else {
    return __shfl_sync(kFullWarp, share, index);
  }
}

template <typename T_, int kGroup, bool kZeros>
struct Int4Weights {
  using T = T_;
  static constexpr int kUnitCols = 128;  // one group of the largest size: two tiles
  static constexpr int kDepth = 4;
  static constexpr bool kRowScales = false;
  static constexpr int kGroups = kUnitCols / kGroup;

  // The 16 to 64 scales (and zeros) of a row tile are spread over the warp in storage order, one load a lane;
  // group_value() hands them out by shuffles.
  template <int kRowTiles>
  struct Unit {
    uint4 tile[kRowTiles][2];
    uint32_t scales[kRowTiles], zeros[kRowTiles];
  };

  // Offsets are 32 bits wide, in units of 16 bytes of weights and of one value of a group: enough for 10^11 weights.
  template <bool kWhole, Epilogue kEpilogue, int kRowTiles>
  static __device__ __forceinline__ void load(Unit<kRowTiles>& w, const Params<T>& p, Cursor at, int lane) {
    const int unit = kWhole ? min(at.unit, p.units - 1) : at.unit;
    const int groups = p.k / kGroup;
    const int first_group = unit * kGroups;
    const int valid = min(kGroups, groups - first_group) * 16;  // <= 0 for an empty unit
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const unsigned row_tile = row_tile_of<kEpilogue, kRowTiles>(p, at.block, r);
      const uint4* tiles = p.qweight + ((row_tile * p.col_tiles + unit * 2) * 32 + lane);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if constexpr (!kWhole) w.tile[r][c] = make_uint4(0, 0, 0, 0);
        if (kWhole || unit * 2 + c < p.col_tiles) w.tile[r][c] = load_once16(tiles + 32 * c);
      }
      const unsigned first = (row_tile * groups + first_group) * 16;
      const uint32_t scales = load_group_values<kWhole, 16 * kGroups>(p.scales, first, valid, lane);
      w.scales[r] = kWhole && at.unit >= p.units ? 0 : scales;
      if constexpr (kZeros) w.zeros[r] = load_group_values<kWhole, 16 * kGroups>(p.zeros, first, valid, lane);
    }
  }

  // acc += scale * (the unit's products), for row tile r.
  template <int kColTiles, int kRowTiles>
  static __device__ __forceinline__ void multiply(float (&acc)[kColTiles][4], const Unit<kRowTiles>& w, int r,
                                                  const Activations<kColTiles, kUnitCols>& x, int lane) {
    constexpr int kWords = 8 / kGroups;
    const int g = lane / 4;
    const uint4(&tile)[2] = w.tile[r];
    const uint32_t words[8] = {tile[0].x, tile[0].y, tile[0].z, tile[0].w, tile[1].x, tile[1].y, tile[1].z, tile[1].w};
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      uint32_t zero_lo = zero_pair<T>(8), zero_hi = zero_lo;
      if constexpr (kZeros) {
        zero_lo = zero_pair<T>(group_value<16 * kGroups>(w.zeros[r], group * 16 + g));
        zero_hi = zero_pair<T>(group_value<16 * kGroups>(w.zeros[r], group * 16 + g + 8));
      }
      float sum[kColTiles][4] = {};
#pragma unroll
      for (int i = group * kWords; i < (group + 1) * kWords; ++i) {
        uint32_t a[4];
        int4_fragment<T>(words[i], zero_lo, zero_hi, a);
#pragma unroll
        for (int c = 0; c < kColTiles; ++c) {
          const uint4& b = x.half_tile[c][i / 2];
          mma_m16n8k16<T>(sum[c], a, i % 2 ? b.z : b.x, i % 2 ? b.w : b.y);
        }
      }
      const float scale_lo = bits_to_float<T>(group_value<16 * kGroups>(w.scales[r], group * 16 + g));
      const float scale_hi = bits_to_float<T>(group_value<16 * kGroups>(w.scales[r], group * 16 + g + 8));
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
cudaError_t for_int4_format(int group_size, bool zeros, Launcher launcher) {
  if (group_size == 32) return zeros ? launcher(Int4Weights<T, 32, true>()) : launcher(Int4Weights<T, 32, false>());
  if (group_size == 64) return zeros ? launcher(Int4Weights<T, 64, true>()) : launcher(Int4Weights<T, 64, false>());
  return zeros ? launcher(Int4Weights<T, 128, true>()) : launcher(Int4Weights<T, 128, false>());
}

}  // namespace hf_fastpath::linear
