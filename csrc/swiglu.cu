// y = silu(gate) * up for rows of gates and ups, as a product with a merged weight leaves them.
#include "common/launch.cuh"
#include "common/swiglu.cuh"

namespace hf_fastpath {
namespace {

constexpr int kThreads = 256, kColsOfThread = 8;

template <typename T>
__global__ void __launch_bounds__(kThreads) swiglu_kernel(const T* x, T* y, int columns) {
  const int64_t row = blockIdx.x;
  const int column = kColsOfThread * static_cast<int>(blockIdx.y * kThreads + threadIdx.x);
  wait_for_previous_kernel();
  let_next_kernel_begin();
  if (column >= columns) return;
  const T* const gates = x + row * 2 * columns + column;
  const uint4 gate = *reinterpret_cast<const uint4*>(gates), up = *reinterpret_cast<const uint4*>(gates + columns);
  *reinterpret_cast<uint4*>(y + row * columns + column) = swiglu_pairs<T>(gate, up);
}

template <typename T>
cudaError_t launch(const void* x, void* y, int rows, int columns, cudaStream_t stream) {
  const int threads = (columns / kColsOfThread + kThreads - 1) / kThreads;
  return launch_kernel_early_if_possible(swiglu_kernel<T>, dim3(rows, threads), kThreads, stream,
                                         static_cast<const T*>(x), static_cast<T*>(y), columns);
}

}  // namespace

cudaError_t launch_swiglu(const void* x, void* y, int rows, int columns, Dtype dtype, cudaStream_t stream) {
  return dtype == Dtype::kFloat16 ? launch<__half>(x, y, rows, columns, stream)
                                  : launch<__nv_bfloat16>(x, y, rows, columns, stream);
}

}  // namespace hf_fastpath
