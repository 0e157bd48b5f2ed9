// cos, sin = the cosine and sine of positions times frequencies, times a factor: a CTA a position. Rounded where
// PyTorch's own operations round, one by one in float32, so that the bits are theirs.
#include "common/dtype.cuh"
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "kernels.h"

namespace hf_fastpath {
namespace {

constexpr int kMaxThreads = 128;

// cos, sin: (rows, 2 * half), both halves alike. Nothing is multiplied and added at once (__fmul_rn).
template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    rope_angles_kernel(const int64_t* positions, const float* inv_freq, float scaling, T* cos, T* sin, int half) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * 2 * half;
  wait_for_previous_kernel();
  let_next_kernel_begin();
  const float position = static_cast<float>(positions[blockIdx.x]);
  for (int i = threadIdx.x; i < half; i += blockDim.x) {
    const float angle = __fmul_rn(position, inv_freq[i]);
    cos[row + i] = cos[row + half + i] = from_float<T>(__fmul_rn(cosf(angle), scaling));
    sin[row + i] = sin[row + half + i] = from_float<T>(__fmul_rn(sinf(angle), scaling));
  }
}

template <typename T>
cudaError_t launch(const int64_t* positions, const float* inv_freq, float scaling, void* cos, void* sin, int rows,
                   int half, cudaStream_t stream) {
  const int threads = half < kMaxThreads ? (half + 31) / 32 * 32 : kMaxThreads;
  return launch_kernel_early_if_possible(rope_angles_kernel<T>, rows, threads, stream, positions, inv_freq, scaling,
                                         static_cast<T*>(cos), static_cast<T*>(sin), half);
}

}  // namespace

cudaError_t launch_rope_angles(const int64_t* positions, const float* inv_freq, float scaling, void* cos, void* sin,
                               int rows, int half, Dtype dtype, cudaStream_t stream) {
  const auto run = dtype == Dtype::kFloat16    ? launch<__half>
                   : dtype == Dtype::kBFloat16 ? launch<__nv_bfloat16>
                                               : launch<float>;
  return run(positions, inv_freq, scaling, cos, sin, rows, half, stream);
}

}  // namespace hf_fastpath
