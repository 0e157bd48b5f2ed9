// What is known of a GPU, and of a kernel on it. The runtime takes up to microseconds to answer or to obey, and a token
// takes hundreds of launches, so it is asked once.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <utility>

namespace hf_fastpath {

struct KernelNotes {
  int shared_bytes = 0;  // that it was granted, more than what every kernel may have
  int ptx_version = 0;   // that this GPU's code of it was compiled for, 90 for 9.0; 0: not known
  bool neighbourly = false;
};

inline std::mutex kernel_notes_lock;
inline std::map<std::pair<const void*, int>, KernelNotes> kernel_notes;
inline std::map<std::pair<int, cudaDeviceAttr>, int> gpu_notes;  // attributes of devices

// An attribute of the current GPU, none of which is negative; -1 where the runtime does not say.
inline int gpu_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return -1;
  const std::lock_guard<std::mutex> guard(kernel_notes_lock);
  const std::pair<int, cudaDeviceAttr> key(device, attribute);
  if (const auto noted = gpu_notes.find(key); noted != gpu_notes.end()) return noted->second;
  if (cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess) {
    cudaGetLastError();  // else the next launch's error would be this one
    return -1;
  }
  return gpu_notes[key] = value;
}

// Those of a kernel on the current GPU, to be used while kernel_notes_lock is held.
template <typename Kernel>
cudaError_t find_kernel_notes(Kernel* kernel, KernelNotes** notes) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) *notes = &kernel_notes[{reinterpret_cast<const void*>(kernel), device}];
  return error;
}

// More than 48 KiB of shared memory, a kernel's static share included, is granted only to kernels that asked for it.
// Never lowered, since another thread may be about to launch.
template <typename Kernel>
cudaError_t allow_shared_bytes(Kernel* kernel, int bytes) {
  if (bytes <= 32 * 1024) return cudaSuccess;
  const std::lock_guard<std::mutex> guard(kernel_notes_lock);
  KernelNotes* notes = nullptr;
  cudaError_t error = find_kernel_notes(kernel, &notes);
  if (error != cudaSuccess || bytes <= notes->shared_bytes) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) {
    notes->shared_bytes = bytes;
  } else {
    cudaGetLastError();  // else the next launch's error would be this one
  }
  return error;
}

// Has a kernel run with as much of a multiprocessor's memory as shared memory as there can be: the split with the L1
// only changes while a multiprocessor is empty, so that a kernel that wants more of it could not begin beside this one.
template <typename Kernel>
void make_room_for_next_kernel(Kernel* kernel) {
  const std::lock_guard<std::mutex> guard(kernel_notes_lock);
  KernelNotes* notes = nullptr;
  if (find_kernel_notes(kernel, &notes) != cudaSuccess || notes->neighbourly) return;
  notes->neighbourly = true;
  // A wish: where a GPU does not grant it, results are the same.
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared) !=
      cudaSuccess) {
    cudaGetLastError();
  }
}

// KernelNotes::ptx_version, which is found out if the GPU has code of the kernel.
template <typename Kernel>
int ptx_version_of(Kernel* kernel) {
  const std::lock_guard<std::mutex> guard(kernel_notes_lock);
  KernelNotes* notes = nullptr;
  if (find_kernel_notes(kernel, &notes) != cudaSuccess) return 0;
  cudaFuncAttributes attributes = {};
  if (notes->ptx_version == 0) {
    if (cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess) {
      notes->ptx_version = attributes.ptxVersion;
    } else {
      cudaGetLastError();
    }
  }
  return notes->ptx_version;
}

}  // namespace hf_fastpath
