// The functions of csrc/common/ptx_sm90.cuh in plain C++, with the semantics of the PTX ISA.
#pragma once

#include "ptx_emulated.cuh"
#include "tensor_map_emulated.cuh"

namespace cuda_emulator {

// What shared addresses start from: not 0, so that an address that was never set is no address.
constexpr uint32_t kSharedWindow = 1024;

struct WgmmaLane {
  float* c;
  const uint32_t* a_at;
  uint32_t a[4];
  uint64_t b;
  bool accumulate;
  int tokens;
  float (*to_float)(uint32_t bits);
};
void wgmma(WgmmaLane& lane, Site site);

// A lane's registers of four matrices, and the row that it stores.
struct MatrixStore {
  const uint32_t* matrices;
  uint16_t row[8];
};
void combine_transposed_store(Lanes& lanes);

inline Matrix matrix_of(const hf_fastpath::TensorMap& map) {
  return {map.matrix, map.rows, map.width, map.row_bytes, map.parts, map.box_rows, map.box_bytes, map.swizzled};
}

}  // namespace cuda_emulator

namespace hf_fastpath {

inline void mbarrier_init(uint64_t* barrier, int count, EMULATED_SITE) {
  cuda_emulator::mbarrier_init(barrier, count, {file, line});
}
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive(uint64_t* barrier, EMULATED_SITE) {
  cuda_emulator::mbarrier_arrive(barrier, {file, line});
}
inline void mbarrier_arrive_after_copies(uint64_t* barrier, EMULATED_SITE) {
  cuda_emulator::mbarrier_arrive_after_copies(barrier, {file, line});
}
inline void mbarrier_wait(uint64_t* barrier, int parity, EMULATED_SITE) {
  cuda_emulator::mbarrier_wait(barrier, parity, {file, line});
}
inline void fence_proxy_async() {
  cuda_emulator::proxy_fence();
}

// How many registers there are, the emulator does not know.
template <int kRegisters>
void take_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}
template <int kRegisters>
void give_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}

inline uint64_t wgmma_descriptor(const void* buffer) {
  const auto offset = static_cast<const unsigned char*>(buffer) - cuda_emulator::dynamic_shared();
  if (offset < 0 || offset % 1024) cuda_emulator::fault("a wgmma operand that is not aligned to 1,024 bytes");
  const uint64_t address = offset + cuda_emulator::kSharedWindow;
  return address >> 4 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}
// Float holds the exact results that its callers want: of a product of 16 bits and a sum near it.
inline uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const auto half = [&](uint32_t pair) { return cuda_emulator::bf16_to_float(pair >> shift & 0xffff); };
    const __nv_bfloat16 sum = __float2bfloat16_rn(std::fmaf(half(a), half(b), half(c)));
    d |= uint32_t{__bfloat16_as_ushort(sum)} << shift;
  }
  return d;
}
inline void wgmma_fence(EMULATED_SITE) {
  cuda_emulator::wgmma_fence({file, line});
}
inline void wgmma_commit(EMULATED_SITE) {
  cuda_emulator::wgmma_commit({file, line});
}
template <int kPending>
void wgmma_wait(EMULATED_SITE) {
  cuda_emulator::wgmma_wait(kPending, {file, line});
}
inline void pin_register(float&) {}
inline void pin_register(uint32_t&) {}

template <typename T, int kTokenTiles>
void wgmma_m64k16(float (&c)[kTokenTiles][4], const uint32_t (&a)[4], uint64_t b, bool accumulate, EMULATED_SITE) {
  constexpr bool kHalf = std::is_same_v<T, __half>;
  static_assert(kHalf || std::is_same_v<T, __nv_bfloat16>);
  cuda_emulator::WgmmaLane lane{&c[0][0], a, {a[0], a[1], a[2], a[3]}, b, accumulate, 8 * kTokenTiles, nullptr};
  lane.to_float = kHalf ? cuda_emulator::half_to_float : cuda_emulator::bf16_to_float;
  cuda_emulator::wgmma(lane, {file, line});
}

inline void mbarrier_arrive_expecting(uint64_t* barrier, int bytes, EMULATED_SITE) {
  cuda_emulator::mbarrier_arrive_expecting(barrier, bytes, {file, line});
}
inline void prefetch_map(const TensorMap&) {}
inline void tensor_load(void* target, const TensorMap& map, int row, int column, uint64_t* barrier, EMULATED_SITE) {
  cuda_emulator::tensor_load(target, cuda_emulator::matrix_of(map), 1, row, column * map.unit, barrier, {file, line});
}
inline void tensor_load_parts(void* target, const TensorMap& map, int row, int column, uint64_t* barrier,
                              EMULATED_SITE) {
  cuda_emulator::tensor_load(target, cuda_emulator::matrix_of(map), 2, row, column * map.unit, barrier, {file, line});
}
inline void tensor_store(const TensorMap& map, int row, int column, const void* source) {
  cuda_emulator::tensor_store(cuda_emulator::matrix_of(map), row, column * map.unit, source);
}
inline void tensor_stores_read() {
  cuda_emulator::tensor_stores_read();
}
inline void store_transposed_8x8x4(void* row, const uint32_t (&matrices)[4], EMULATED_SITE) {
  cuda_emulator::MatrixStore lane{matrices, {}};
  cuda_emulator::warp_meet("stmatrix", 0xffffffffu, &lane, cuda_emulator::combine_transposed_store, {file, line});
  cuda_emulator::check(row, 16, true, 16, __builtin_return_address(0));
  std::memcpy(row, lane.row, 16);
}
inline void warpgroup_barrier(int number, EMULATED_SITE) {
  cuda_emulator::warpgroup_barrier(number, {file, line});
}

inline void cluster_barrier(EMULATED_SITE) {
  cuda_emulator::cluster_barrier({file, line});
}
inline void cluster_barrier_of_readers(EMULATED_SITE) {
  cuda_emulator::cluster_barrier({file, line});
}
inline void cluster_arrive() {}
inline void cluster_wait(EMULATED_SITE) {
  cuda_emulator::cluster_barrier({file, line});
}
inline void store_to_cluster(float4* own, int rank, const float4& value, EMULATED_SITE) {
  *static_cast<float4*>(const_cast<void*>(cuda_emulator::in_cluster(own, rank, {file, line}))) = value;
}
inline float4 load_from_cluster(const float4* own, int rank, EMULATED_SITE) {
  return *static_cast<const float4*>(cuda_emulator::in_cluster(own, rank, {file, line}));
}

}  // namespace hf_fastpath
