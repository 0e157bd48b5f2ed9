// What launchers ask the CUDA runtime: the emulated GPU has compute capability 9.0.
#include <cuda_runtime_api.h>

namespace {
int shared_limit = 227 * 1024;
}

extern "C" {

// Every call returns its own error, and none stays behind.
cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = shared_limit;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = 228 * 1024;
      return cudaSuccess;
    default:
      return cudaErrorNotSupported;
  }
}

}  // extern "C"

namespace cuda_emulator {
extern int written_since;
int written_since = 0;
}  // namespace cuda_emulator

// See ptx_emulated.cuh.
extern "C" __attribute__((visibility("default"))) void emulator_set_written_since(int amount) {
  cuda_emulator::written_since = amount;
}

// The shared memory that a CTA can have, of GPUs with less.
extern "C" __attribute__((visibility("default"))) void emulator_set_shared_limit(int bytes) {
  shared_limit = bytes;
}
