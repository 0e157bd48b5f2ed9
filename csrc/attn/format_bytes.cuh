// Decode attention over keys and values of one byte: int8 with a scale a token, fp8 (E4M3) with one a token or a group
// of
// 64. Both are exact in fp16, and so are their products with the query, which is scaled by a power of two to fp16's
// upper range (store_query()).
#pragma once

#include <cuda_fp8.h>

#include "../common/dequant.cuh"
#include "format_16bit.cuh"

namespace hf_fastpath::attn {

// How bytes become fp16. The first pair of unpack() has bytes 0 and kSecond of a word, the second pair the others.
struct Int8Codec {
  static constexpr int kSecond = 2;
  static __device__ __forceinline__ void unpack(uint32_t word, uint32_t& first, uint32_t& second) {
    first = int8_pair<__half>(word);
    second = int8_pair<__half>(word >> 8);
  }
  // Bytes 2 * half and 2 * half + 1 of two words, side by side.
  static __device__ __forceinline__ void unpack_columns(uint32_t a, uint32_t b, int half, uint32_t& first,
                                                        uint32_t& second) {
    unpack(__byte_perm(a, b, half ? 0x7632 : 0x5410), first, second);
  }
};
struct Fp8Codec {
  static constexpr int kSecond = 1;
  static __device__ __forceinline__ void unpack(uint32_t word, uint32_t& first, uint32_t& second) {
    first = pair(word & 0xffff);
    second = pair(word >> 16);
  }
  static __device__ __forceinline__ void unpack_columns(uint32_t a, uint32_t b, int half, uint32_t& first,
                                                        uint32_t& second) {
    unpack(__byte_perm(a, b, half ? 0x7362 : 0x5140), first, second);
  }

 private:
  static __device__ __forceinline__ uint32_t pair(uint32_t codes) {
    const __half2_raw both = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(codes), __NV_E4M3);
    return both.x | static_cast<uint32_t>(both.y) << 16;
  }
};

// Query heads as B fragments of fp16: lane t has channels 64 * block + 16 * t and the 15 behind.
template <int kPadded, typename Codec>
struct ByteQuery {
  uint32_t b[kPadded / 64][4][2];
  float factor[2];

  // The channels of a word in the order of the codec's pairs.
  struct Order {
    static constexpr bool kScaled = true;
    static constexpr int kExponent = 13;
    static __device__ __forceinline__ int of(int channel) {
      return Codec::kSecond == 1 ? channel : (channel & ~3) | (channel & 1) << 1 | (channel & 2) >> 1;
    }
  };

  __device__ __forceinline__ void load(const SharedQuery<kPadded>& shared, float to_score, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int chunk = 0; chunk < kPadded / 32; ++chunk) {
      const uint4 v = shared.chunk(g, chunk / 2 * 64 + t * 16 + chunk % 2 * 8);
      uint32_t (&word)[4][2] = b[chunk / 2];
      word[chunk % 2 * 2][0] = v.x, word[chunk % 2 * 2][1] = v.y;
      word[chunk % 2 * 2 + 1][0] = v.z, word[chunk % 2 * 2 + 1][1] = v.w;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) factor[i] = ldexpf(to_score, -shared.added[2 * t + i]);
  }
};

enum class Scales { kOfToken, kOfGroup, kOfSlot };  // fp16, fp32, fp16

template <typename T_, int kPadded_, bool kWhole, typename Tuning_, typename Codec, Scales kScales>
struct ByteFormat {
  using T = T_;
  using Tuning = Tuning_;
  static constexpr int kPadded = kPadded_, kTile = 32, kTiles = kTile / 16, kBlocks = kPadded / 64;
  static constexpr bool kHasFull = kScales == Scales::kOfGroup, kMinima = false, kSlots = kScales == Scales::kOfSlot;
  static constexpr uint32_t kAllPresent = 0xffffffff;
  static constexpr int kRowChunks = kPadded / 16, kSideBytes = kTile * kPadded;
  static constexpr int kScaleBytes = 2 * kTile;  // a side
  static constexpr int kStageBytes = 2 * (kSideBytes + kScaleBytes);
  using Query = ByteQuery<kPadded, Codec>;
  using Order = typename Query::Order;
  using State = Running<kBlocks, kMinima>;
  // With rows of 64 bytes, two of them are as wide as the banks.
  using RowSwizzle = std::conditional_t<kPadded == 64, NoSwizzle, KeySwizzle>;

  static __device__ __forceinline__ int token(int m, int g, int h) { return 16 * m + g + 8 * h; }
  static __device__ __forceinline__ int block_width(int) { return 64; }
  static __device__ __forceinline__ int quads(const AttnDecodeArgs& a) { return (kWhole ? kPadded : a.dim) / 4; }

  const unsigned char *keys, *values, *key_scales, *value_scales;
  int row_bytes, group_tokens;
  RowCopy<kTile, kRowChunks, kWhole, RowSwizzle> key_copy;
  RowCopy<kTile, kRowChunks, kWhole, ValueSwizzle> value_copy;

  __device__ __forceinline__ ByteFormat(const AttnDecodeArgs& a, int64_t pair, int lane)
      : key_copy(lane), value_copy(lane) {
    row_bytes = kWhole ? kPadded : a.dim;
    group_tokens = a.group_tokens;
    const int64_t tokens = pair * a.capacity;
    const int64_t scales = kScales == Scales::kOfGroup ? tokens / group_tokens * 4 : tokens * 2;
    keys = static_cast<const unsigned char*>(a.keys.data) + tokens * row_bytes;
    values = static_cast<const unsigned char*>(a.values.data) + tokens * row_bytes;
    key_scales = static_cast<const unsigned char*>(a.keys.scale) + scales;
    value_scales = static_cast<const unsigned char*>(a.values.scale) + scales;
  }
  // Nothing but time depends on it, so heads of other sizes go without.
  __device__ __forceinline__ void prefetch(int tile, int lane) const {
    constexpr int kLines = kTile * kPadded / 128;
    const int64_t offset = int64_t{tile} * kTile * row_bytes;
    if constexpr (kWhole && kLines % 16 == 0) prefetch_lines<kLines>(keys + offset, values + offset, lane);
  }
  __device__ __forceinline__ void copy(unsigned char* stage, int tile, int coded, int lane) const {
    const int64_t offset = int64_t{tile} * kTile * row_bytes;
    const int there = kHasFull ? kTile : coded - tile * kTile;  // groups are whole
    key_copy.run(stage, keys + offset, row_bytes, there, lane);
    value_copy.run(stage + kSideBytes, values + offset, row_bytes, there, lane);
    unsigned char* const scales = stage + 2 * kSideBytes;
    if constexpr (kScales == Scales::kOfGroup) {
      const int64_t group = int64_t{tile} * kTile / group_tokens * 4;
      if (lane < 2) cp_async4(scales + lane * kScaleBytes, (lane ? value_scales : key_scales) + group, there > 0);
    } else if (lane < 8) {
      const unsigned char* from = (lane < 4 ? key_scales : value_scales) + int64_t{tile} * kTile * 2;
      const bool valid = there > lane % 4 * 8;
      cp_async16(scales + lane * 16, from + (valid ? lane % 4 * 16 : 0), valid);
    }
  }
  // Puts 8 channels of a key or value (side 0 or 1) into row `row` of a tile, of those that `lane` has of a row, and
  // its scale: `Row` has both.
  template <typename Row>
  static __device__ __forceinline__ void put(unsigned char* stage, int side, int row, int lane, const Row& channels) {
    const int chunk = row * kRowChunks + lane / 2;
    const int place = side ? ValueSwizzle::of(chunk, row) : RowSwizzle::of(chunk, row);
    *reinterpret_cast<uint2*>(stage + side * kSideBytes + 16 * place + lane % 2 * 8) = channels.bytes;
    unsigned char* const scales = stage + 2 * kSideBytes + side * kScaleBytes;
    if (lane == 0) reinterpret_cast<__half*>(scales)[row] = channels.scale;
  }
  // Of token row g + 8h; 0 for one that is not present, where the cache may hold anything.
  __device__ __forceinline__ static float scale(const unsigned char* scales, uint32_t present, int row) {
    if constexpr (kScales == Scales::kOfGroup) return *reinterpret_cast<const float*>(scales);
    return present >> row & 1 ? __half2float(reinterpret_cast<const __half*>(scales)[row]) : 0.0f;
  }
  __device__ __forceinline__ void scores(float (&s)[kTiles][4], const unsigned char* stage, const Query& q,
                                         uint32_t present, int lane) const {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      float part[2][4] = {};  // two sums, since each waits for its last product
#pragma unroll
      for (int block = 0; block < kPadded / 64; ++block) {
        uint4 row[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          row[h] = read16(stage + 16 * RowSwizzle::of(token(m, g, h) * kRowChunks + block * 4 + t, g));
        }
        const uint32_t lo[4] = {row[0].x, row[0].y, row[0].z, row[0].w};
        const uint32_t hi[4] = {row[1].x, row[1].y, row[1].z, row[1].w};
#pragma unroll
        for (int word = 0; word < 4; ++word) {
          uint32_t a[4];
          Codec::unpack(lo[word], a[0], a[2]);
          Codec::unpack(hi[word], a[1], a[3]);
          mma_m16n8k16<__half>(part[word % 2], a, q.b[block][word][0], q.b[block][word][1]);
        }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float key_scale = scale(stage + 2 * kSideBytes, present, token(m, g, h));
#pragma unroll
        for (int j = 0; j < 2; ++j) s[m][2 * h + j] = (part[0][2 * h + j] + part[1][2 * h + j]) * key_scale;
      }
    }
  }
  __device__ __forceinline__ void add_values(State& r, const float (&weights)[kTiles][4], const float (&rescale)[2],
                                             const unsigned char* stage, uint32_t present, int lane) const {
    const int g = lane / 4, t = lane % 4;
    const unsigned char* const scales = stage + 2 * kSideBytes + kScaleBytes;
    float of_row[kTiles][2], largest = 0.0f;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        of_row[m][h] = scale(scales, present, token(m, g, h));
        largest = fmaxf(largest, of_row[m][h]);
      }
    }
    if constexpr (kScales != Scales::kOfGroup) {
      largest = __uint_as_float(__reduce_max_sync(kFullWarp, __float_as_uint(largest)));
    }
    const float unit = rescale_output(r, rescale, exponent_of(largest));
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      const uint2 b = weight_fragment<__half>(weights[m], of_row[m][0] * unit, of_row[m][1] * unit);
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        uint2 row[4];  // 8 channels of tokens 2t, 2t + 1, 2t + 8, 2t + 9
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int number = 16 * m + 2 * t + i % 2 + 8 * (i / 2);
          const int chunk = ValueSwizzle::of(number * kRowChunks + block * 4 + g / 2, number);
          row[i] = read8(stage + kSideBytes + 16 * chunk + 8 * (g % 2));
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const auto word = [&](int i) { return j < 2 ? row[i].x : row[i].y; };
          uint32_t a[4];
          Codec::unpack_columns(word(0), word(1), j % 2, a[0], a[1]);
          Codec::unpack_columns(word(2), word(3), j % 2, a[2], a[3]);
          mma_m16n8k16<__half>(r.out[block][j], a, b.x, b.y);
        }
      }
    }
  }
};

}  // namespace hf_fastpath::attn
