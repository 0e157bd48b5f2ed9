// Packed int8 weights (hf_fastpath/packing_int8.py) to a 16-bit matrix, bit-identical to the reference: q is exact, its
// product with the scale is rounded once. One warp a tile of 16 rows by 32 columns: a lane reads 16 bytes, 8 columns of
// two rows.
#include "common/dequant.cuh"
#include "common/launch.cuh"
#include "common/memory.cuh"
#include "kernels.h"

namespace hf_fastpath {
namespace {

constexpr int kWarps = 4;

template <typename T>
__global__ void __launch_bounds__(32 * kWarps) w8a16_dequantize_kernel(const W8A16DequantizeArgs p) {
  using P = typename Pair<T>::type;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int col_tiles = p.k / 32;
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (tile >= static_cast<int64_t>((p.n + 15) / 16) * col_tiles) return;
  const uint4 packed = load_once16(static_cast<const uint4*>(p.qweight) + tile * 32 + lane);
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = tile / col_tiles * 16 + g + 8 * half;
    if (row >= p.n) return;
    const uint32_t scale = static_cast<const uint16_t*>(p.scales)[row];
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      pairs[i] = as_bits(__hmul2(as_pair<P>(int8_pair<T>(words[i] >> (8 * half))), as_pair<P>(scale | (scale << 16))));
    }
    T* target = static_cast<T*>(p.out) + row * p.k + tile % col_tiles * 32 + 8 * t;
    *reinterpret_cast<uint4*>(target) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  }
}

template <typename T>
cudaError_t launch(const W8A16DequantizeArgs& a, cudaStream_t stream) {
  const int64_t tiles = static_cast<int64_t>((a.n + 15) / 16) * (a.k / 32);
  const unsigned grid = static_cast<unsigned>((tiles + kWarps - 1) / kWarps);
  return launch_kernel(w8a16_dequantize_kernel<T>, grid, 32 * kWarps, stream, a);
}

}  // namespace

cudaError_t launch_w8a16_dequantize(const W8A16DequantizeArgs& args, Dtype dtype, cudaStream_t stream) {
  if (dtype == Dtype::kFloat16) return launch<__half>(args, stream);
  return launch<__nv_bfloat16>(args, stream);
}

}  // namespace hf_fastpath
