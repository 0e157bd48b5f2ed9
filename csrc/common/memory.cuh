// Loads and stores of 16 bytes and less.
#pragma once

#include <cstdint>

namespace hf_fastpath {

// For data read once: it does not displace the activations in L1.
__device__ __forceinline__ uint4 load_once16(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

__device__ __forceinline__ uint2 load_once8(const void* p) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}

// Eight 16-bit values, 16-byte aligned (kAligned) or aligned to 2 bytes only.
template <bool kAligned>
__device__ __forceinline__ uint4 load_8x16bit(const void* p) {
  if constexpr (kAligned) return __ldg(reinterpret_cast<const uint4*>(p));
  const uint16_t* h = reinterpret_cast<const uint16_t*>(p);
  uint32_t w[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) w[i] = __ldg(h + 2 * i) | (static_cast<uint32_t>(__ldg(h + 2 * i + 1)) << 16);
  return make_uint4(w[0], w[1], w[2], w[3]);
}

inline bool aligned_to(const void* p, size_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

}  // namespace hf_fastpath
