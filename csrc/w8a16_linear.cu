// y = x @ (q * scale).T + bias for 1..16 rows of x and q packed int8 (hf_fastpath/packing_int8.py), one scale an
// output; see common/decode_linear.cuh. int8 is exact in fp16 and bf16, products and sums are fp32, and the whole sum
// is multiplied by the scale in fp32.
#include "common/decode_linear.cuh"

namespace hf_fastpath {
namespace {

using linear::Activations;
using linear::Epilogue;
using linear::Params;

template <typename T_>
struct Int8Weights {
  using T = T_;
  static constexpr int kUnitCols = 64;  // two tiles: as many bytes as a unit of int4
  static constexpr bool kRowScales = true, kWideOutput = false;
  static constexpr int kGroups = 0;

  static __device__ __forceinline__ uint4 prepared(const uint4& x) { return x; }

  template <int kTiles>
  struct StageOf {
    uint4 tile[kTiles][2][32];
  };

  template <Epilogue kEpilogue, bool kWhole, int kWarps>
  class Source {
   public:
    __device__ __forceinline__ Source(const Params<T>& p, int first_row_tile, int padded_units, int lane)
        : tiles_(p, first_row_tile, padded_units, lane) {}
    __device__ __forceinline__ void copy(StageOf<linear::kRowTiles<kEpilogue>>& stage, const Params<T>& p,
                                         const linear::Cursor<kEpilogue, kWarps>& at, int lane) const {
      tiles_.copy(stage.tile, p, at, lane);
    }
    __device__ __forceinline__ void advance(bool wrapped) { tiles_.advance(wrapped); }

   private:
    linear::TileSource<kEpilogue, kWhole, kWarps> tiles_;
  };

  // acc += the unit's products, for row tile r.
  template <int kColTiles, int kTiles>
  static __device__ __forceinline__ void multiply(float (&acc)[kColTiles][4], const StageOf<kTiles>& stage, int r,
                                                  const Activations<kColTiles, kUnitCols>& x,
                                                  const linear::GroupSums<0, kColTiles>&, int lane) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const uint4 tile = stage.tile[r][c][lane];
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
