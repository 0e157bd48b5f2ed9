// Stands in for the toolkit's cuda_runtime.h when g++ compiles the kernels for the emulator: the qualifiers, built-in
// variables and device functions that the kernels use. Types come from the toolkit; semantics from the CUDA C++
// Programming Guide and the CUDA Math API.
#pragma once

#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

#include "emulator.h"

#undef __global__
#undef __shared__
#undef __device__
#undef __launch_bounds__
#undef __grid_constant__
#undef __forceinline__
#define __global__
#define __device__
#define __launch_bounds__(...)
#define __grid_constant__
#define __forceinline__ inline  // a hint: big functions take g++ several times as long as many small ones
// Shared memory is a static variable: one CTA runs at a time. (Those of a cluster run together; each has dynamic shared
// memory of its own, and a kernel launched in clusters must have no other.) The emulator learns from the library's
// symbol table which variables these are (g++ drops a section attribute in templates), and takes their contents away
// between CTAs.
#define __shared__ static

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace cuda_emulator {

// A kernel and its arguments: what a GPU keeps in constant memory.
template <typename... Params>
struct KernelCall {
  void (*kernel)(Params...);
  std::tuple<Params...> params;

  static void run(const void* call) {
    const auto* self = static_cast<const KernelCall*>(call);
    std::apply(self->kernel, self->params);
  }
};

}  // namespace cuda_emulator

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      if (attribute.val.clusterDim.y != 1 || attribute.val.clusterDim.z != 1) return cudaErrorNotSupported;
      cluster = attribute.val.clusterDim.x;
    } else if (attribute.id != cudaLaunchAttributeProgrammaticStreamSerialization) {
      return cudaErrorNotSupported;  // grids run one after the other: an early launch is a launch
    }
  }
  const cuda_emulator::KernelCall<Params...> call{kernel, {std::forward<Args>(args)...}};
  return cuda_emulator::run_grid(config->gridDim, config->blockDim, cluster, call.run, &call, sizeof call,
                                 config->dynamicSmemBytes);
}

// The limit is that of compute capability 9.0.
template <typename... Params>
cudaError_t cudaFuncSetAttribute(void (*)(Params...), cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaErrorNotSupported;
  return value <= 227 * 1024 ? cudaSuccess : cudaErrorInvalidValue;
}

template <typename... Params>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(Params...)) {
  *attributes = {};
  attributes->ptxVersion = 90;
  return cudaSuccess;
}

// ---- barriers and shuffles ------------------------------------------------------------------------------------------
#define EMULATED_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(EMULATED_SITE) {
  cuda_emulator::cta_barrier({file, line});
}
inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATED_SITE) {
  cuda_emulator::warp_barrier(mask, {file, line});
}

namespace cuda_emulator {

// One lane's part of a shuffle or vote: `source` is the lane to read, or -1 for its own value.
struct Shuffle {
  uint64_t value;
  int source;
};
void combine_shuffle(Lanes& lanes);
void combine_any(Lanes& lanes);
void combine_ballot(Lanes& lanes);
void combine_max(Lanes& lanes);

template <typename T>
T shuffle(const char* what, unsigned mask, T value, int source, Site site) {
  static_assert(sizeof(T) <= 8);
  Shuffle lane{0, source};
  std::memcpy(&lane.value, &value, sizeof value);
  warp_meet(what, mask, &lane, combine_shuffle, site);
  std::memcpy(&value, &lane.value, sizeof value);
  return value;
}

inline uint64_t vote(const char* what, unsigned mask, bool predicate, void (*combine)(Lanes&), Site site) {
  Shuffle lane{predicate, 0};
  warp_meet(what, mask, &lane, combine, site);
  return lane.value;
}

inline int lane_id() {
  return static_cast<int>((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % kWarpSize);
}

}  // namespace cuda_emulator

// With width < 32 the warp is cut into parts of that many lanes.
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, EMULATED_SITE) {
  const int base = cuda_emulator::lane_id() / width * width;
  return cuda_emulator::shuffle("__shfl_sync", mask, value, base + (lane & (width - 1)), {file, line});
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, EMULATED_SITE) {
  const int lane = cuda_emulator::lane_id(), source = lane ^ lane_mask;
  const bool own = source >= lane / width * width + width;  // a later part cannot be read, an earlier one can
  return cuda_emulator::shuffle("__shfl_xor_sync", mask, value, own ? lane : source, {file, line});
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATED_SITE) {
  const int lane = cuda_emulator::lane_id(), source = lane % width + static_cast<int>(delta);
  const int from = source < width ? lane + static_cast<int>(delta) : lane;
  return cuda_emulator::shuffle("__shfl_down_sync", mask, value, from, {file, line});
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATED_SITE) {
  const int lane = cuda_emulator::lane_id(), source = lane % width - static_cast<int>(delta);
  const int from = source >= 0 ? lane - static_cast<int>(delta) : lane;
  return cuda_emulator::shuffle("__shfl_up_sync", mask, value, from, {file, line});
}
inline int __any_sync(unsigned mask, int predicate, EMULATED_SITE) {
  return static_cast<int>(cuda_emulator::vote("__any_sync", mask, predicate, cuda_emulator::combine_any, {file, line}));
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATED_SITE) {
  const auto combine = cuda_emulator::combine_ballot;
  return static_cast<unsigned>(cuda_emulator::vote("__ballot_sync", mask, predicate, combine, {file, line}));
}

inline unsigned __reduce_max_sync(unsigned mask, unsigned value, EMULATED_SITE) {
  cuda_emulator::Shuffle lane{value, 0};
  cuda_emulator::warp_meet("__reduce_max_sync", mask, &lane, cuda_emulator::combine_max, {file, line});
  return static_cast<unsigned>(lane.value);
}

inline void __trap() {
  cuda_emulator::fault("__trap");
}

// ---- arithmetic -----------------------------------------------------------------------------------------------------
using std::max;
using std::min;

template <typename T>
T __ldg(const T* p) {
  return *p;
}

template <typename T>
T __ldcg(const T* p) {
  return *p;
}

inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fadd_rn(float a, float b) {
  return a + b;
}
inline float __fsub_rn(float a, float b) {
  return a - b;
}
inline float __fdiv_rn(float a, float b) {
  return a / b;
}
inline float __frcp_rn(float a) {
  return 1.0f / a;
}
inline float __fsqrt_rn(float a) {
  return std::sqrt(a);
}
// Correctly rounded here; the GPU's may be off by two units in the last place.
inline float rsqrtf(float a) {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(a)));
}
// Saturates, and gives 0 for a NaN.
inline int __float2int_rn(float a) {
  if (std::isnan(a)) return 0;
  const float rounded = std::nearbyintf(a);
  if (rounded >= 2147483648.0f) return 2147483647;
  return rounded < -2147483648.0f ? -2147483647 - 1 : static_cast<int>(rounded);
}
// Byte i of the result is byte (selector >> 4 * i) & 7 of b:a; bit 3 would replicate the sign and is not supported.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= (bytes >> (selector >> (4 * i) & 7) * 8 & 0xff) << (8 * i);
  return result;
}
