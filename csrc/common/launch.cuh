// The one place that launches kernels: a plain C++ call, which compilers without CUDA understand too.
#pragma once

#include <cuda_runtime.h>

#include <utility>

namespace hf_fastpath {

// Queues kernel(args...) on a stream; returns the launch's error.
template <typename... Params, typename... Args>
cudaError_t launch_kernel(void (*kernel)(Params...), dim3 grid, dim3 block, cudaStream_t stream, Args&&... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}

}  // namespace hf_fastpath
