// The functions of csrc/common/ptx.cuh in plain C++, with the semantics of the PTX ISA.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

namespace cuda_emulator {

struct MmaLane {
  float* c;           // 4
  const uint32_t* a;  // 4
  uint32_t b[2];
};
struct IntegerMmaLane {
  int* c;             // 4
  const uint32_t* a;  // 4
  uint32_t b[2];
};
float half_to_float(uint32_t bits);
extern int written_since;  // what the kernel before is assumed to add to a word that was read early
float bf16_to_float(uint32_t bits);
void combine_mma_fp16(Lanes& lanes);
void combine_mma_bf16(Lanes& lanes);
void combine_mma_u8s8(Lanes& lanes);
void combine_transpose(Lanes& lanes);

}  // namespace cuda_emulator

namespace hf_fastpath {

inline uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) {
  return (a & mask) | bits;
}
inline uint32_t and_xor(uint32_t a, uint32_t mask, uint32_t bits) {
  return (a & mask) ^ bits;
}

inline uint32_t max_u16x2(uint32_t a, uint32_t b) {
  return std::max(a & 0xffffu, b & 0xffffu) | std::max(a >> 16, b >> 16) << 16;
}
inline void keep_in_register(int&) {}

inline float max_nan(float a, float b) {
  return std::isnan(a) || std::isnan(b) ? NAN : std::fmax(a, b);
}

inline float exp2_fast(float x) {
  return std::exp2(x);
}

inline int lane_number() {
  return cuda_emulator::lane_id();
}

inline uint4 load_once16(const void* p) {
  return *static_cast<const uint4*>(p);
}
inline uint2 load_once8(const void* p) {
  return *static_cast<const uint2*>(p);
}
inline uint4 load_early16(const void* p) {
  return *static_cast<const uint4*>(p);
}

inline int load_now(const int* p) {
  return *p;
}
// The kernel before may have written since then.
inline int load_early(const int* p) {
  return *p - cuda_emulator::written_since;
}
inline float2 load_now(const float2* p) {
  return *p;
}
inline float4 load_now(const float4* p) {
  return *p;
}
inline uint32_t draw_ticket(uint32_t* counter, uint32_t last) {
  return cuda_emulator::draw_ticket(counter, last, __builtin_return_address(0));
}
inline void prefetch_l2(const void* p) {
  cuda_emulator::check(p, 1, false, 1, __builtin_return_address(0));
}

inline uint64_t evict_first_policy() {
  return 0x12f0000000000000;
}

template <typename T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, EMULATED_SITE) {
  constexpr bool kHalf = std::is_same_v<T, __half>;
  static_assert(kHalf || std::is_same_v<T, __nv_bfloat16>);
  cuda_emulator::MmaLane lane{c, a, {b0, b1}};
  const auto combine = kHalf ? cuda_emulator::combine_mma_fp16 : cuda_emulator::combine_mma_bf16;
  cuda_emulator::warp_meet("mma.m16n8k16", 0xffffffffu, &lane, combine, {file, line});
}

inline void mma_m16n8k32(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, EMULATED_SITE) {
  cuda_emulator::IntegerMmaLane lane{c, a, {b0, b1}};
  cuda_emulator::warp_meet("mma.m16n8k32", 0xffffffffu, &lane, cuda_emulator::combine_mma_u8s8, {file, line});
}

// Grids run one after the other.
inline void wait_for_previous_kernel() {}
inline void let_next_kernel_begin() {}

inline void cp_async16(void* target, const void* source, bool valid = true) {
  cuda_emulator::cp_async(target, source, 16, valid);
}
inline void cp_async8(void* target, const void* source, bool valid = true) {
  cuda_emulator::cp_async(target, source, 8, valid);
}
inline void cp_async4(void* target, const void* source, bool valid = true) {
  cuda_emulator::cp_async(target, source, 4, valid);
}
inline void cp_async16_once(void* target, const void* source, uint64_t policy) {
  if (policy != evict_first_policy()) cuda_emulator::fault("cp.async with what is not a cache policy");
  cuda_emulator::cp_async(target, source, 16, true);
}
inline void cp_async16_once_of128(void* target, const void* source, uint64_t policy, bool valid) {
  if (policy != evict_first_policy()) cuda_emulator::fault("cp.async with what is not a cache policy");
  cuda_emulator::cp_async(target, source, 16, valid);
}
inline void cp_async_commit() {
  cuda_emulator::cp_async_commit();
}
template <int kPending>
void cp_async_wait() {
  cuda_emulator::cp_async_wait(kPending);
}

inline uint32_t transpose_8x8(uint32_t rows, EMULATED_SITE) {
  cuda_emulator::warp_meet("movmatrix", 0xffffffffu, &rows, cuda_emulator::combine_transpose, {file, line});
  return rows;
}

}  // namespace hf_fastpath
