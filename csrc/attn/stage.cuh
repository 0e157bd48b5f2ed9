// Decode attention: tiles on their way through shared memory, and 16-byte chunks of a query.
#pragma once

#include "../common/memory.cuh"
#include "../common/ptx.cuh"

namespace hf_fastpath::attn {

// Copies rows of row_bytes bytes, which stand behind one another, to rows of kRowChunks chunks of 16 bytes; zeros stand
// for what a row lacks and for rows from rows_there on. Swizzle::of(chunk, row) is where a chunk, counted through all
// rows, goes: lanes that read at the same time are to find different banks.
template <int kRows, int kRowChunks, typename Swizzle>
__device__ __forceinline__ void copy_rows(unsigned char* target, const unsigned char* source, int row_bytes,
                                          int rows_there, int lane) {
  static_assert(kRows * kRowChunks % 32 == 0);
#pragma unroll
  for (int i = 0; i < kRows * kRowChunks / 32; ++i) {
    const int index = i * 32 + lane, row = index / kRowChunks, offset = index % kRowChunks * 16;
    const bool there = row < rows_there && offset < row_bytes;
    cp_async16(target + 16 * Swizzle::of(index, row), source + (there ? row * row_bytes + offset : 0), there);
  }
}
// The same for rows of a multiple of 8 bytes.
template <int kRows, int kRowChunks, typename Swizzle>
__device__ __forceinline__ void copy_rows8(unsigned char* target, const unsigned char* source, int row_bytes,
                                           int rows_there, int lane) {
#pragma unroll
  for (int i = 0; i < kRows * kRowChunks / 16; ++i) {
    const int index = i * 32 + lane, row = index / 2 / kRowChunks, offset = index % (2 * kRowChunks) * 8;
    const bool there = row < rows_there && offset < row_bytes;
    unsigned char* to = target + 16 * Swizzle::of(index / 2, row) + 8 * (index % 2);
    cp_async8(to, source + (there ? row * row_bytes + offset : 0), there);
  }
}
// kChunks chunks of 16 bytes that stand behind one another; zeros for those that begin at `bytes` or beyond.
template <int kChunks>
__device__ __forceinline__ void copy_chunks(unsigned char* target, const unsigned char* source, int bytes, int lane) {
#pragma unroll
  for (int i = 0; i < kChunks; i += 32) {
    const int offset = 16 * (i + lane);
    if (i + lane < kChunks) cp_async16(target + offset, source + (offset < bytes ? offset : 0), offset < bytes);
  }
}

__device__ __forceinline__ uint4 read16(const unsigned char* p) {
  return *reinterpret_cast<const uint4*>(p);
}
__device__ __forceinline__ uint2 read8(const unsigned char* p) {
  return *reinterpret_cast<const uint2*>(p);
}

// Keys by rows: lanes t = 0 .. 3 of rows r and r + 1 read four chunks each.
struct KeySwizzle {
  static __device__ __forceinline__ int of(int chunk, int row) { return chunk ^ (row & 1) << 2; }
};
// Values by columns: lanes t read rows 2t or 2t + 1, lanes g and g + 1 neighbouring chunks.
struct ValueSwizzle {
  static __device__ __forceinline__ int of(int chunk, int row) { return chunk ^ (row >> 1 & 3) << 1; }
};
struct NoSwizzle {
  static __device__ __forceinline__ int of(int chunk, int) { return chunk; }
};

// Channels first .. first + 7 of one of the query heads of a CTA; zeros where there is no such head or channel.
template <typename T>
__device__ __forceinline__ uint4 query_chunk(const T* heads, int head, int head_count, int first, int dim,
                                             bool aligned) {
  if (head >= head_count || first >= dim) return make_uint4(0, 0, 0, 0);
  const T* from = heads + head * dim + first;
  return aligned ? load_8x16bit<true>(from) : load_8x16bit<false>(from);
}

// A head's channels in fp16, multiplied by a power of two that makes the largest one's exponent `exponent`: exact for
// all but those that are 2^-20 of it or less. `v` has this lane's channels of head g, which the other lanes t share.
// Returns what was added to the exponents.
template <int kValues>
__device__ __forceinline__ int scale_query(float (&v)[kValues], int exponent) {
  float largest = 0.0f;
#pragma unroll
  for (float x : v) largest = fmaxf(largest, fabsf(x));
  largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
  largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
  // ilogbf of 0 and of infinity are out of range; then the power is 1. ldexpf, since the power may overflow.
  const bool normal = largest > 0.0f && largest < __builtin_huge_valf();
  const int added = normal ? exponent - ilogbf(largest) : 0;
#pragma unroll
  for (float& x : v) x = ldexpf(x, added);
  return added;
}

}  // namespace hf_fastpath::attn
