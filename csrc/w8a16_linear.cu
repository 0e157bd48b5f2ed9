// y = x @ (q * scale).T + bias for 1..16 rows of x and q packed int8 (hf_fastpath/packing_int8.py), one scale an
// output; see common/decode_linear.cuh. int8 is exact in fp16 and bf16, products and sums are fp32, and the whole sum
// is multiplied by the scale in fp32.
#include "common/decode_linear.cuh"
#include "common/dequant.cuh"

namespace hf_fastpath {
namespace {

using linear::Activations;
using linear::Cursor;
using linear::Epilogue;
using linear::Params;

template <typename T_>
struct Int8Weights {
  using T = T_;
  static constexpr int kUnitCols = 64;  // two tiles: as many bytes as a unit of int4
  static constexpr int kDepth = 4;
  static constexpr bool kRowScales = true;

  template <int kRowTiles>
  struct Unit {
    uint4 tile[kRowTiles][2];
  };

  // Offsets are 32 bits wide, in units of 16 bytes: enough for 6 * 10^10 weights.
  template <bool kWhole, Epilogue kEpilogue, int kRowTiles>
  static __device__ __forceinline__ void load(Unit<kRowTiles>& w, const Params<T>& p, Cursor at, int lane) {
    const int unit = kWhole ? min(at.unit, p.units - 1) : at.unit;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const unsigned row_tile = linear::row_tile_of<kEpilogue, kRowTiles>(p, at.block, r);
      const uint4* tiles = p.qweight + ((row_tile * p.col_tiles + unit * 2) * 32 + lane);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if constexpr (!kWhole) w.tile[r][c] = make_uint4(0, 0, 0, 0);
        if (kWhole || unit * 2 + c < p.col_tiles) w.tile[r][c] = load_once16(tiles + 32 * c);
      }
    }
  }

  // acc += the unit's products, for row tile r.
  template <int kColTiles, int kRowTiles>
  static __device__ __forceinline__ void multiply(float (&acc)[kColTiles][4], const Unit<kRowTiles>& w, int r,
                                                  const Activations<kColTiles, kUnitCols>& x, int) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const uint4& tile = w.tile[r][c];
      const uint32_t words[4] = {tile.x, tile.y, tile.z, tile.w};
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const uint32_t even = words[2 * step], odd = words[2 * step + 1];
        const uint32_t a[4] = {int8_pair<T>(even), int8_pair<T>(even >> 8), int8_pair<T>(odd), int8_pair<T>(odd >> 8)};
#pragma unroll
        for (int col = 0; col < kColTiles; ++col) {
          const uint4& b = x.half_tile[col][c];
          mma_m16n8k16<T>(acc[col], a, step ? b.z : b.x, step ? b.w : b.y);
        }
      }
    }
  }
};

template <typename T>
cudaError_t launch(const W8A16LinearArgs& a, int sm_count, cudaStream_t stream) {
  Params<T> p = {};
  p.x = static_cast<const T*>(a.x);
  p.x_row_stride = a.x_row_stride;
  p.qweight = static_cast<const uint4*>(a.qweight);
  p.scales = static_cast<const uint16_t*>(a.scales);
  p.bias = static_cast<const T*>(a.bias);
  p.y = static_cast<T*>(a.y);
  p.m = a.m, p.n = a.n, p.k = a.k;
  p.row_tiles = (a.n + 15) / 16;
  p.col_tiles = a.k / 32;
  p.units = (a.k + Int8Weights<T>::kUnitCols - 1) / Int8Weights<T>::kUnitCols;
  return linear::launch_plain<Int8Weights<T>>(p, sm_count, stream);
}

}  // namespace

cudaError_t launch_w8a16_linear(const W8A16LinearArgs& args, Dtype dtype, int sm_count, cudaStream_t stream) {
  if (dtype == Dtype::kFloat16) return launch<__half>(args, sm_count, stream);
  return launch<__nv_bfloat16>(args, sm_count, stream);
}

}  // namespace hf_fastpath
