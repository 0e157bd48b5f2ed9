// Packed int4 weights (hf_fastpath/packing.py) to a 16-bit matrix, bit-identical to the reference: q - zero is exact,
// its product with the scale is rounded once. One warp a tile of 16 rows by 64 columns; a lane's nibbles are four runs
// of 8 columns, so it reads 16 bytes once and stores 16 bytes four times.
#include "common/dequant.cuh"
#include "common/launch.cuh"
#include "common/memory.cuh"
#include "kernels.h"

namespace hf_fastpath {
namespace {

constexpr int kWarps = 4;

template <typename T>
struct Params {
  const uint4* qweight;
  const uint16_t* scales;
  const uint8_t* zeros;
  T* out;
  int n, k, group_size;
  int row_tiles, col_tiles;
};

// The eight columns of one row: fragment registers 0 and 2 (row g) or 1 and 3 (row g + 8) of two neighbouring words.
template <typename T>
__device__ __forceinline__ uint4 scaled(const uint32_t (&even)[4], const uint32_t (&odd)[4], int i, uint32_t scale) {
  using P = typename Pair<T>::type;
  const P s = as_pair<P>(scale | (scale << 16));
  return make_uint4(as_bits(__hmul2(as_pair<P>(even[i]), s)), as_bits(__hmul2(as_pair<P>(even[i + 2]), s)),
                    as_bits(__hmul2(as_pair<P>(odd[i]), s)), as_bits(__hmul2(as_pair<P>(odd[i + 2]), s)));
}

template <typename T>
__global__ void __launch_bounds__(32 * kWarps) w4a16_dequantize_kernel(const Params<T> p) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (tile >= static_cast<int64_t>(p.row_tiles) * p.col_tiles) return;
  const int64_t row_tile = tile / p.col_tiles;
  const int col_tile = static_cast<int>(tile % p.col_tiles);
  const uint4 packed = load_once16(p.qweight + tile * 32 + lane);
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int col = col_tile * 64 + half * 32;
    if (col >= p.k) return;
    const int64_t first = (row_tile * (p.k / p.group_size) + col / p.group_size) * 16;
    const uint32_t zero_lo = zero_pair<T>(p.zeros ? p.zeros[first + g] : 8);
    const uint32_t zero_hi = zero_pair<T>(p.zeros ? p.zeros[first + g + 8] : 8);
    uint32_t even[4], odd[4];
    int4_fragment<T>(words[2 * half], zero_lo, zero_hi, even);
    int4_fragment<T>(words[2 * half + 1], zero_lo, zero_hi, odd);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = row_tile * 16 + g + 8 * i;
      if (row >= p.n) continue;
      const uint32_t scale = p.scales[first + g + 8 * i];
      *reinterpret_cast<uint4*>(p.out + row * p.k + col + 8 * t) = scaled<T>(even, odd, i, scale);
    }
  }
}

template <typename T>
cudaError_t launch(const W4A16DequantizeArgs& a, cudaStream_t stream) {
  const Params<T> p{static_cast<const uint4*>(a.qweight),
                    static_cast<const uint16_t*>(a.scales),
                    a.zeros,
                    static_cast<T*>(a.out),
                    a.n,
                    a.k,
                    a.group_size,
                    (a.n + 15) / 16,
                    (a.k + 63) / 64};
  const int64_t tiles = static_cast<int64_t>(p.row_tiles) * p.col_tiles;
  return launch_kernel(w4a16_dequantize_kernel<T>, static_cast<unsigned>((tiles + kWarps - 1) / kWarps), 32 * kWarps,
                       stream, p);
}

}  // namespace

cudaError_t launch_w4a16_dequantize(const W4A16DequantizeArgs& args, Dtype dtype, cudaStream_t stream) {
  if (dtype == Dtype::kFloat16) return launch<__half>(args, stream);
  return launch<__nv_bfloat16>(args, stream);
}

}  // namespace hf_fastpath
