// Loads and stores of 16 bytes and less.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "ptx.cuh"

namespace hf_fastpath {

// Eight 16-bit values, 16-byte aligned (kAligned) or aligned to 2 bytes only.
template <bool kAligned>
__device__ __forceinline__ uint4 load_8x16bit(const void* p) {
  if constexpr (kAligned) return *reinterpret_cast<const uint4*>(p);
  const uint16_t* h = reinterpret_cast<const uint16_t*>(p);
  uint32_t w[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) w[i] = h[2 * i] | static_cast<uint32_t>(h[2 * i + 1]) << 16;
  return make_uint4(w[0], w[1], w[2], w[3]);
}

#ifdef HF_FASTPATH_EMULATED
using cuda_emulator::dynamic_shared;
#else
// The launch's dynamic shared memory: of 1,024-byte alignment when the kernel has no other.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char bytes[];
  return bytes;
}
#endif

inline bool aligned_to(const void* p, size_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

}  // namespace hf_fastpath
