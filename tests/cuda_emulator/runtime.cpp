// What launchers ask the CUDA runtime: the emulated GPU has compute capability 9.0.
#include <cuda_runtime_api.h>

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
  if (attribute != cudaDevAttrComputeCapabilityMajor && attribute != cudaDevAttrComputeCapabilityMinor) {
    return cudaErrorNotSupported;
  }
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : 0;
  return cudaSuccess;
}

}  // extern "C"
