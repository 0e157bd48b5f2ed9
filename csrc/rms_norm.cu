// y = RMSNorm(x) for the products that do not normalize x themselves: a CTA a row.
#include "common/decode_norm.cuh"
#include "common/launch.cuh"

namespace hf_fastpath {
namespace {

using linear::kColsAtOnce;
using linear::kWarpsOfRow;

constexpr int kHeld = 4;  // pieces of kColsAtOnce columns that stay in registers; those of a longer row are read twice

template <typename T>
__global__ void __launch_bounds__(32 * kWarpsOfRow) rms_norm_kernel(const RmsNormArgs a) {
  __shared__ float squares[kWarpsOfRow];
  const T* const row = static_cast<const T*>(a.x) + blockIdx.x * a.x_row_stride;
  const T* const weight = static_cast<const T*>(a.weight);
  T* const target = static_cast<T*>(a.y) + static_cast<int64_t>(blockIdx.x) * a.k;
  const auto read = [](const T* from) { return *reinterpret_cast<const uint4*>(from); };
  const auto column = [](int i) { return 8 * static_cast<int>(threadIdx.x) + i * kColsAtOnce; };
  uint4 w[kHeld], x[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    w[i] = column(i) < a.k ? load_early16(weight + column(i)) : make_uint4(0, 0, 0, 0);
  }
  wait_for_previous_kernel();
  let_next_kernel_begin();
#pragma unroll
  for (int i = 0; i < kHeld; ++i) x[i] = column(i) < a.k ? read(row + column(i)) : make_uint4(0, 0, 0, 0);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) sum = linear::add_squares<T>(sum, x[i]);
  for (int col = column(kHeld); col < a.k; col += kColsAtOnce) sum = linear::add_squares<T>(sum, read(row + col));
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = sum;
  __syncthreads();
  const float inverse = linear::inverse_rms(squares, a.k, a.eps);
  const auto write = [&](int col, const uint4& value, const uint4& scale) {
    *reinterpret_cast<uint4*>(target + col) = linear::normalized<T>(value, inverse, scale);
  };
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (column(i) < a.k) write(column(i), x[i], w[i]);
  }
  for (int col = column(kHeld); col < a.k; col += kColsAtOnce) write(col, read(row + col), read(weight + col));
}

template <typename T>
cudaError_t launch(const RmsNormArgs& args, cudaStream_t stream) {
  return launch_kernel_early_if_possible(rms_norm_kernel<T>, args.m, 32 * kWarpsOfRow, stream, args);
}

}  // namespace

cudaError_t launch_rms_norm(const RmsNormArgs& args, Dtype dtype, cudaStream_t stream) {
  return dtype == Dtype::kFloat16 ? launch<__half>(args, stream) : launch<__nv_bfloat16>(args, stream);
}

}  // namespace hf_fastpath
