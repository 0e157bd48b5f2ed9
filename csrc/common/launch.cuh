// The one place that launches kernels: a plain C++ call, which compilers without CUDA understand too.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <utility>

#include "kernel_notes.cuh"

namespace hf_fastpath {

// The shared memory that a CTA can have on the current GPU. Not noted: the tests' GPU can be given less.
inline int max_shared_bytes() {
  int device = 0, bytes = 48 * 1024;
  if (cudaGetDevice(&device) == cudaSuccess) {
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  return bytes;
}

// The shared memory of a multiprocessor of the current GPU.
inline int shared_bytes_of_multiprocessor() {
  return std::max(gpu_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor), 48 * 1024);
}

// Whether the current GPU has programmatic dependent launch (launch_kernel_early()).
inline bool has_early_launch() {
  return gpu_attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
}

// Queues kernel(args...) on a stream, with dynamic shared memory and launch attributes; returns the launch's error.
template <typename... Params, typename... Args>
cudaError_t launch_kernel_with(cudaLaunchAttribute* attributes, int attribute_count, void (*kernel)(Params...),
                               dim3 grid, dim3 block, int shared_bytes, cudaStream_t stream, Args&&... args) {
  const cudaError_t error = allow_shared_bytes(kernel, shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = attribute_count;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}

template <typename... Params, typename... Args>
cudaError_t launch_kernel_with_shared(void (*kernel)(Params...), dim3 grid, dim3 block, int shared_bytes,
                                      cudaStream_t stream, Args&&... args) {
  return launch_kernel_with(nullptr, 0, kernel, grid, block, shared_bytes, stream, std::forward<Args>(args)...);
}

template <typename... Params, typename... Args>
cudaError_t launch_kernel(void (*kernel)(Params...), dim3 grid, dim3 block, cudaStream_t stream, Args&&... args) {
  return launch_kernel_with_shared(kernel, grid, block, 0, stream, std::forward<Args>(args)...);
}

// Queues clusters of `cluster_size` CTAs, neighbours in the grid, which is a multiple of it: CTAs that run at the same
// time and read each other's shared memory. The kernel may begin while the stream's kernel before it still runs, and
// waits for its results with wait_for_previous_kernel() (programmatic dependent launch). Both are for compute
// capability 9.0 and newer.
template <typename... Params, typename... Args>
cudaError_t launch_kernel_in_clusters(void (*kernel)(Params...), dim3 grid, dim3 block, int cluster_size,
                                      int shared_bytes, cudaStream_t stream, Args&&... args) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = static_cast<unsigned>(cluster_size);
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  make_room_for_next_kernel(kernel);
  return launch_kernel_with(attributes, cluster_size > 1 ? 2 : 1, kernel, grid, block, shared_bytes, stream,
                            std::forward<Args>(args)...);
}

// The same without clusters.
template <typename... Params, typename... Args>
cudaError_t launch_kernel_early(void (*kernel)(Params...), dim3 grid, dim3 block, int shared_bytes, cudaStream_t stream,
                                Args&&... args) {
  return launch_kernel_in_clusters(kernel, grid, block, 1, shared_bytes, stream, std::forward<Args>(args)...);
}

// launch_kernel_early() where the GPU has it, else a plain launch, after which there is nothing to wait for.
template <typename... Params, typename... Args>
cudaError_t launch_kernel_early_if_possible(void (*kernel)(Params...), dim3 grid, dim3 block, cudaStream_t stream,
                                            Args&&... args) {
  if (has_early_launch()) return launch_kernel_early(kernel, grid, block, 0, stream, std::forward<Args>(args)...);
  return launch_kernel(kernel, grid, block, stream, std::forward<Args>(args)...);
}

// Whether this GPU's code of the kernel is the one with wgmma: compiled for sm_90a, not PTX of another architecture.
template <typename Kernel>
bool is_for_this_gpu(Kernel* kernel) {
  return gpu_attribute(cudaDevAttrComputeCapabilityMajor) == 9 &&
         gpu_attribute(cudaDevAttrComputeCapabilityMinor) == 0 && ptx_version_of(kernel) == 90;
}

}  // namespace hf_fastpath
