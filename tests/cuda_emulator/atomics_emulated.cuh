// Atomics of CUDA C++.
#pragma once

#include <cstdint>

namespace cuda_emulator {
// Checked like a read and a write, which do not race with other atomics.
uint32_t atomic_add(uint32_t* address, uint32_t value, const void* code);
}  // namespace cuda_emulator

inline uint32_t atomicAdd(uint32_t* address, uint32_t value) {
  return cuda_emulator::atomic_add(address, value, __builtin_return_address(0));
}
