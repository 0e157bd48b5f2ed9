// Decode attention: tiles on their way through shared memory, and 16-byte chunks of a query.
#pragma once

#include "../common/dtype.cuh"
#include "../common/memory.cuh"
#include "../common/reduce.cuh"
#include "work.cuh"

namespace hf_fastpath::attn {

// Copies rows of row_bytes bytes, which stand behind one another, to rows of kRowChunks chunks of 16 bytes; zeros stand
// for what a row lacks (kWhole: nothing) and for rows from rows_there on. Swizzle::of(chunk, row) is where a chunk,
// counted through all rows, goes: lanes that read at the same time are to find different banks. It is linear: of two
// numbers that have no bit in common, that of their sum is the exclusive or of theirs.
template <int kRows, int kRowChunks, bool kWhole, typename Swizzle>
struct RowCopy {
  static constexpr int kCopies = kRows * kRowChunks / 32;
  static_assert(kRows * kRowChunks % 32 == 0);
  int first;  // where this lane's first chunk goes, in bytes

  __device__ __forceinline__ explicit RowCopy(int lane) : first(16 * Swizzle::of(lane, lane / kRowChunks)) {}

  __device__ __forceinline__ void run(unsigned char* target, const unsigned char* source, int row_bytes, int rows_there,
                                      int lane) const {
    if (kWhole && rows_there >= kRows) {
      source += 16 * lane;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const int flip = 16 * (Swizzle::of(32 * i, 32 * i / kRowChunks) ^ 32 * i);
        cp_async16(target + (first ^ flip) + 512 * i, source + 512 * i);
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int index = i * 32 + lane, row = index / kRowChunks, offset = index % kRowChunks * 16;
      const bool there = row < rows_there && offset < row_bytes;
      cp_async16(target + 16 * Swizzle::of(index, row), source + (there ? row * row_bytes + offset : 0), there);
    }
  }
};
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
template <int kChunks, typename Swizzle>
__device__ __forceinline__ void copy_chunks(unsigned char* target, const unsigned char* source, int bytes, int lane) {
#pragma unroll
  for (int i = 0; i < kChunks; i += 32) {
    const int offset = 16 * (i + lane);
    if (i + lane < kChunks) {
      cp_async16(target + 16 * Swizzle::of(i + lane), source + (offset < bytes ? offset : 0), offset < bytes);
    }
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
  static constexpr __device__ __forceinline__ int of(int chunk, int row) { return chunk ^ (row & 1) << 2; }
};
// Values by columns: lanes t read rows 2t or 2t + 1, lanes g and g + 1 neighbouring chunks.
struct ValueSwizzle {
  static constexpr __device__ __forceinline__ int of(int chunk, int row) { return chunk ^ (row >> 1 & 3) << 1; }
};
struct NoSwizzle {
  static constexpr __device__ __forceinline__ int of(int chunk, int) { return chunk; }
};

// The query heads of a CTA in shared memory, 16 bits a channel, zeros beyond them. The pitch keeps the heads that lanes
// read at the same time apart in the banks.
template <int kPadded>
struct SharedQuery {
  static constexpr int kPitch = kPadded + 8;
  uint16_t channel[kHeadsPerCta][kPitch];
  int added[kHeadsPerCta];  // to the exponents, see store_query()

  __device__ __forceinline__ uint4 chunk(int head, int first) const {
    return *reinterpret_cast<const uint4*>(&channel[head][first]);
  }
};

// How a format wants its query: as it is, or in fp16, in the order of Order::of(channel), each head multiplied by a
// power of two that makes the exponent of its largest channel kExponent: exact for all channels but those that are
// 2^-20 of it or less.
struct PlainQuery {
  static constexpr bool kScaled = false;
  static constexpr int kExponent = 0;
  static __device__ __forceinline__ int of(int channel) { return channel; }
};

// All warps store the query; a barrier has to follow. `raw`: as it is besides, or nullptr.
template <typename Order, typename T, int kPadded>
__device__ __forceinline__ void store_query(SharedQuery<kPadded>& shared, SharedQuery<kPadded>* raw, const T* heads,
                                            int head_count, int dim, int warp, int warps, int lane) {
  constexpr int kEach = kPadded / 32;
  for (int head = warp; head < kHeadsPerCta; head += warps) {
    if (head >= head_count) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        shared.channel[head][32 * i + lane] = 0;
        if (raw) raw->channel[head][32 * i + lane] = 0;
      }
      if (lane == 0) shared.added[head] = 0;
      continue;
    }
    uint16_t bits[kEach];
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int channel = 32 * i + lane;
      bits[i] = 0;
      if (channel < dim) bits[i] = reinterpret_cast<const uint16_t*>(heads)[head * dim + channel];
      largest = fmaxf(largest, fabsf(bits_to_float<T>(bits[i])));
    }
    float factor = 1.0f;
    if constexpr (Order::kScaled) {
#pragma unroll
      for (int offset = 16; offset; offset /= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, offset));
      }
      // Of 0, infinity and what only NaNs are beside, the factor stays 1; 2^126 is enough for the smallest ones.
      const bool normal = largest > 0.0f && largest < __builtin_huge_valf();
      const int added =
          normal ? min(Order::kExponent + 127 - static_cast<int>(__float_as_uint(largest) >> 23), 126) : 0;
      factor = __uint_as_float(static_cast<uint32_t>(added + 127) << 23);
      if (lane == 0) shared.added[head] = added;
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int channel = 32 * i + lane;
      if (raw) raw->channel[head][channel] = bits[i];
      if constexpr (Order::kScaled) {
        const __half scaled = __float2half_rn(bits_to_float<T>(bits[i]) * factor);
        bits[i] = *reinterpret_cast<const uint16_t*>(&scaled);
      }
      shared.channel[head][Order::of(channel)] = bits[i];
    }
  }
}

// Asks for kLines lines of 128 bytes of keys and values each.
template <int kLines>
__device__ __forceinline__ void prefetch_lines(const unsigned char* keys, const unsigned char* values, int lane) {
  static_assert(kLines % 16 == 0);
  if constexpr (kLines == 16) {
    prefetch_l2((lane < 16 ? keys : values) + lane % 16 * 128);
  } else {
#pragma unroll
    for (int i = 0; i < kLines / 32; ++i) {
      prefetch_l2(keys + 128 * (32 * i + lane));
      prefetch_l2(values + 128 * (32 * i + lane));
    }
  }
}

}  // namespace hf_fastpath::attn
