// y = RMSNorm(x), or s = x + residual and y = RMSNorm(s): a CTA a row. For what comes before the products that do not
// normalize x themselves.
#include "common/decode_norm.cuh"
#include "common/launch.cuh"

namespace hf_fastpath {
namespace {

using linear::kColsAtOnce;
using linear::kWarpsOfRow;

constexpr int kHeld = 4;  // pieces of kColsAtOnce columns that stay in registers; those of a longer row are read twice

// 8 sums, each rounded to 16 bits.
template <typename T>
__device__ __forceinline__ uint4 add(const uint4& a, const uint4& b) {
  const uint32_t lefts[4] = {a.x, a.y, a.z, a.w}, rights[4] = {b.x, b.y, b.z, b.w};
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float lo = bits_to_float<T>(lefts[i]) + bits_to_float<T>(rights[i]);
    const float hi = bits_to_float<T>(lefts[i] >> 16) + bits_to_float<T>(rights[i] >> 16);
    words[i] = pack_floats(lo, hi, T());
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

template <typename T, bool kAdd>
__global__ void __launch_bounds__(32 * kWarpsOfRow)
    rms_norm_kernel(const RmsNormArgs a, const void* residual, void* sums) {
  __shared__ float squares[kWarpsOfRow];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * a.k;  // of this row in what is contiguous
  const T* const row = static_cast<const T*>(a.x) + blockIdx.x * a.x_row_stride;
  const T* const weight = static_cast<const T*>(a.weight);
  T* const target = static_cast<T*>(a.y) + first;
  const T* const other = static_cast<const T*>(residual) + first;
  const auto read = [&](int col) {
    const uint4 x = load_early16(row + col);
    if constexpr (!kAdd) return x;
    return add<T>(x, load_early16(other + col));
  };
  const auto column = [](int i) { return 8 * static_cast<int>(threadIdx.x) + i * kColsAtOnce; };
  const auto load = [&](uint4(&to)[kHeld], const T* from) {  // all are under way before the first is used
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      to[i] = column(i) < a.k ? load_early16(from + column(i)) : make_uint4(0, 0, 0, 0);
    }
  };
  uint4 w[kHeld], x[kHeld];
  load(w, weight);
  wait_for_previous_kernel();
  let_next_kernel_begin();
  load(x, row);
  if constexpr (kAdd) {
    uint4 r[kHeld];
    load(r, other);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) x[i] = add<T>(x[i], r[i]);
  }
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) sum = linear::add_squares<T>(sum, x[i]);
  for (int col = column(kHeld); col < a.k; col += kColsAtOnce) sum = linear::add_squares<T>(sum, read(col));
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = sum;
  __syncthreads();
  const float inverse = linear::inverse_rms(squares, a.k, a.eps);
  const auto write = [&](int col, const uint4& value, const uint4& scale) {
    if constexpr (kAdd) *reinterpret_cast<uint4*>(static_cast<T*>(sums) + first + col) = value;
    *reinterpret_cast<uint4*>(target + col) = linear::normalized<T>(value, inverse, scale);
  };
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (column(i) < a.k) write(column(i), x[i], w[i]);
  }
  for (int col = column(kHeld); col < a.k; col += kColsAtOnce) write(col, read(col), load_early16(weight + col));
}

template <bool kAdd>
cudaError_t launch(const RmsNormArgs& args, const void* residual, void* sums, Dtype dtype, cudaStream_t stream) {
  const auto run = [&](auto kernel) {
    return launch_kernel_early_if_possible(kernel, args.m, 32 * kWarpsOfRow, stream, args, residual, sums);
  };
  return dtype == Dtype::kFloat16 ? run(rms_norm_kernel<__half, kAdd>) : run(rms_norm_kernel<__nv_bfloat16, kAdd>);
}

}  // namespace

cudaError_t launch_rms_norm(const RmsNormArgs& args, Dtype dtype, cudaStream_t stream) {
  return launch<false>(args, nullptr, nullptr, dtype, stream);
}

cudaError_t launch_add_rms_norm(const RmsNormArgs& args, const void* residual, void* sums, Dtype dtype,
                                cudaStream_t stream) {
  return launch<true>(args, residual, sums, dtype, stream);
}

}  // namespace hf_fastpath
