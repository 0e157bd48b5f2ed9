// Decode attention over 4-bit codes (KIVI): keys with a scale and a minimum a channel and group of tokens, values with
// both a token and part of the channels.
//
// A key's channel is q * scale + minimum. The scales go into the query: its products with them are rounded to fp16,
// 2^-12 of each at most (below fp16's range 2^-25, the query's largest channel being 2 to 4), as rounding the keys
// themselves to fp16 would. The minima add one product with the query a group, exact. The codes are exact in fp16.
// A value's minima are summed in fp32, a sum a part, and added at the end.
//
// A tile has 32 tokens, since a word of values has 8 tokens of a channel, and each of four lanes takes a word: row
// g + 8h of product m is token 4g + 2m + h, so that the weights of a lane's tokens come out in its hands.
#pragma once

#include "format_bytes.cuh"

namespace hf_fastpath::attn {

// The four pairs of a word's 4-bit codes, as fp16: codes i and i + 4.
__device__ __forceinline__ void unpack_codes(uint32_t word, uint32_t (&pairs)[4]) {
  const __half2 bias_1024 = as_pair<__half2>(0x64006400), bias_64 = as_pair<__half2>(0x54005400);
  const uint32_t high = word >> 8;
  // In 1024 + n the code is in bits 0 to 3, in 64 + n in bits 4 to 7.
  pairs[0] = as_bits(__hsub2(as_pair<__half2>(and_or(word, 0x000f000f, 0x64006400)), bias_1024));
  pairs[1] = as_bits(__hsub2(as_pair<__half2>(and_or(word, 0x00f000f0, 0x54005400)), bias_64));
  pairs[2] = as_bits(__hsub2(as_pair<__half2>(and_or(high, 0x000f000f, 0x64006400)), bias_1024));
  pairs[3] = as_bits(__hsub2(as_pair<__half2>(and_or(high, 0x00f000f0, 0x54005400)), bias_64));
}
// Eight fp16 values in the same order.
__device__ __forceinline__ void pair_values(uint4 v, uint32_t (&pairs)[4]) {
  pairs[0] = __byte_perm(v.x, v.z, 0x5410), pairs[1] = __byte_perm(v.x, v.z, 0x7632);
  pairs[2] = __byte_perm(v.y, v.w, 0x5410), pairs[3] = __byte_perm(v.y, v.w, 0x7632);
}

// Query heads in fp16: lane t has kPadded / 4 channels from kPadded / 4 * t on.
template <int kPadded>
struct Int4Query {
  static constexpr int kWords = kPadded / 32;
  uint32_t b[kWords][4];
  float factor[2];

  // Eight channels in the order of unpack_codes(). Times a scale, which is at most 2 * 65504 / 15, a channel stays
  // below fp16's largest.
  struct Order {
    static constexpr bool kScaled = true;
    static constexpr int kExponent = 1;
    static __device__ __forceinline__ int of(int channel) {
      return (channel & ~7) | (channel & 3) << 1 | (channel & 4) >> 2;
    }
  };

  __device__ __forceinline__ void load(const SharedQuery<kPadded>& shared, float to_score, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      const uint4 v = shared.chunk(g, 8 * (t * kWords + word));
      b[word][0] = v.x, b[word][1] = v.y, b[word][2] = v.z, b[word][3] = v.w;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) factor[i] = ldexpf(to_score, -shared.added[2 * t + i]);
  }
};

template <typename T_, int kPadded_, bool kWhole, typename Tuning_>
struct Int4Format {
  using T = T_;
  using Tuning = Tuning_;
  static constexpr int kPadded = kPadded_, kTile = 32, kTiles = 2, kBlocks = kPadded / 64;
  static constexpr bool kHasFull = true, kMinima = true, kSlots = false;
  static constexpr uint32_t kAllPresent = 0xffffffff;
  static constexpr int kKeyChunks = kPadded / 32, kValueChunks = kPadded / 4;  // a token; 8 tokens
  static constexpr int kSideBytes = kTile * kPadded / 2;
  static constexpr int kKeyParams = 4 * kPadded, kValueParams = 2 * kBlocks * kTile * 2;  // bytes
  static constexpr int kStageBytes = 2 * kSideBytes + kKeyParams + kValueParams;
  using Query = Int4Query<kPadded>;
  using Order = typename Query::Order;
  using State = Running<kBlocks, kMinima>;

  // Keys by rows: lanes t = 0 .. 3 of rows r, r + 4, ... read neighbouring chunks, or halves of them.
  struct RowSwizzle {
    static constexpr __device__ __forceinline__ int of(int chunk, int row) {
      return kPadded == 64 ? chunk ^ (row >> 2 & 3) << 1 : chunk ^ (row >> 2 & 1) << (kPadded == 128 ? 2 : 0);
    }
  };
  // Values: lanes t read rows t, of 8 tokens, lanes g and g + 1 chunks 2g and 2g + 2.
  struct WordSwizzle {
    static constexpr __device__ __forceinline__ int of(int chunk, int row) {
      return chunk ^ (row & 1) ^ (row & 2) << 1;
    }
  };

  // Keys' parameters: lanes t read chunks that are kPadded / 32 apart.
  struct ParamSwizzle {
    static __device__ __forceinline__ int of(int chunk) { return chunk ^ (chunk >> 3 & 3); }
  };

  static __device__ __forceinline__ int token(int m, int g, int h) { return 4 * g + 2 * m + h; }
  __device__ __forceinline__ int block_width(int) const { return part_width; }
  static __device__ __forceinline__ int quads(const AttnDecodeArgs& a) { return (kWhole ? kPadded : a.dim) / 4; }

  const unsigned char *keys, *values, *key_params, *value_params;
  int dim, group_tokens, parts, part_width;
  RowCopy<kTile, kKeyChunks, kWhole, RowSwizzle> key_copy;
  RowCopy<kTile / 8, kValueChunks, kWhole, WordSwizzle> value_copy;

  __device__ __forceinline__ Int4Format(const AttnDecodeArgs& a, int64_t pair, int lane)
      : key_copy(lane), value_copy(lane) {
    dim = kWhole ? kPadded : a.dim;
    group_tokens = a.group_tokens;
    parts = (dim + 63) / 64;
    while (!kWhole && dim % parts) ++parts;
    part_width = dim / parts;
    const int64_t tokens = pair * a.capacity, groups = tokens / group_tokens;
    keys = static_cast<const unsigned char*>(a.keys.data) + tokens * dim / 2;
    values = static_cast<const unsigned char*>(a.values.data) + tokens * dim / 2;
    key_params = static_cast<const unsigned char*>(a.keys.scale) + groups * 4 * dim;
    value_params = static_cast<const unsigned char*>(a.values.scale) + groups * 4 * parts * group_tokens;
  }
  // Nothing but time depends on it, so heads of other sizes go without.
  __device__ __forceinline__ void prefetch(int tile, int lane) const {
    constexpr int kLines = kTile * kPadded / 2 / 128;
    const int64_t offset = int64_t{tile} * kTile * dim / 2;
    if constexpr (kWhole && kLines % 16 == 0) prefetch_lines<kLines>(keys + offset, values + offset, lane);
  }
  __device__ __forceinline__ void copy(unsigned char* stage, int tile, int, int lane) const {  // groups are whole
    const int64_t offset = int64_t{tile} * kTile * dim / 2;
    if (dim % 32 == 0) {
      key_copy.run(stage, keys + offset, dim / 2, kTile, lane);
    } else {
      copy_rows8<kTile, kKeyChunks, RowSwizzle>(stage, keys + offset, dim / 2, kTile, lane);
    }
    stage += kSideBytes;
    value_copy.run(stage, values + offset, 4 * dim, kTile / 8, lane);
    stage += kSideBytes;
    const int first = tile * kTile, group = first / group_tokens;
    const unsigned char* of_group = key_params + int64_t{group} * 4 * dim;
    copy_chunks<kPadded / 8, ParamSwizzle>(stage, of_group, 2 * dim, lane);                          // scales
    copy_chunks<kPadded / 8, ParamSwizzle>(stage + 2 * kPadded, of_group + 2 * dim, 2 * dim, lane);  // minima
    stage += kKeyParams;
    // Scales, then minima; of each part those of the tile's tokens.
    of_group = value_params + int64_t{group} * 4 * parts * group_tokens + 2 * (first % group_tokens);
    if (lane / 4 < 2 * parts) {
      cp_async16(stage + (lane / 4 / parts * kBlocks + lane / 4 % parts) * 2 * kTile + lane % 4 * 16,
                 of_group + lane / 4 * 2 * group_tokens + lane % 4 * 16);
    }
  }
  __device__ __forceinline__ void scores(float (&s)[kTiles][4], const unsigned char* stage, const Query& q, uint32_t,
                                         int lane) const {
    const int g = lane / 4, t = lane % 4;
    const unsigned char* const params = stage + 2 * kSideBytes;
    uint32_t scaled[Query::kWords][4];
    float minimum[2][4] = {};
#pragma unroll
    for (int word = 0; word < Query::kWords; ++word) {
      uint32_t scale[4], low[4];
      const int at = 16 * ParamSwizzle::of(t * Query::kWords + word);
      pair_values(read16(params + at), scale);
      pair_values(read16(params + 2 * kPadded + at), low);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scaled[word][i] = as_bits(__hmul2(as_pair<__half2>(q.b[word][i]), as_pair<__half2>(scale[i])));
      }
      const uint32_t first[4] = {low[0], low[0], low[1], low[1]}, second[4] = {low[2], low[2], low[3], low[3]};
      mma_m16n8k16<__half>(minimum[0], first, q.b[word][0], q.b[word][1]);
      mma_m16n8k16<__half>(minimum[1], second, q.b[word][2], q.b[word][3]);
    }
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      uint32_t row[2][Query::kWords];
#pragma unroll
      for (int h = 0; h < 2; ++h) read_keys(row[h], stage, token(m, g, h), t);
      float part[2][4] = {};
#pragma unroll
      for (int word = 0; word < Query::kWords; ++word) {
        uint32_t lo[4], hi[4];
        unpack_codes(row[0][word], lo);
        unpack_codes(row[1][word], hi);
        const uint32_t first[4] = {lo[0], hi[0], lo[1], hi[1]}, second[4] = {lo[2], hi[2], lo[3], hi[3]};
        mma_m16n8k16<__half>(part[0], first, scaled[word][0], scaled[word][1]);
        mma_m16n8k16<__half>(part[1], second, scaled[word][2], scaled[word][3]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) s[m][i] = part[0][i] + part[1][i] + (minimum[0][i] + minimum[1][i]);
    }
  }
  __device__ __forceinline__ void add_values(State& r, const float (&weights)[kTiles][4], const float (&rescale)[2],
                                             const unsigned char* stage, uint32_t, int lane) const {
    const int g = lane / 4, t = lane % 4;
    const unsigned char* const params = stage + 2 * kSideBytes + kKeyParams + 8 * g;  // of tokens 4g .. 4g + 3
    float scale[kBlocks][4];
    float largest = 0.0f;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      if (block >= parts) break;
      token_values(scale[block], params + block * 2 * kTile);
#pragma unroll
      for (float x : scale[block]) largest = fmaxf(largest, x);
      float low[4];
      token_values(low, params + (kBlocks + block) * 2 * kTile);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) r.minima[block][j] += weights[i / 2][2 * (i % 2) + j] * low[i];
      }
    }
    const float unit = rescale_output(
        r, rescale, exponent_of(__uint_as_float(__reduce_max_sync(kFullWarp, __float_as_uint(largest)))));
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      if (block >= parts) break;
      uint2 b[kTiles];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        b[m] = weight_fragment<__half>(weights[m], scale[block][2 * m] * unit, scale[block][2 * m + 1] * unit);
      }
      uint4 words[2] = {};  // channels 8g .. 8g + 7, 8 tokens each
      if (8 * g < part_width) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int chunk = t * kValueChunks + block * part_width / 4 + 2 * g + k;
          words[k] = read16(stage + kSideBytes + 16 * WordSwizzle::of(chunk, t));
        }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint4& w = words[j / 2];
        uint32_t lo[4], hi[4];
        unpack_codes(j % 2 ? w.z : w.x, lo);
        unpack_codes(j % 2 ? w.w : w.y, hi);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          const uint32_t a[4] = {lo[2 * m], hi[2 * m], lo[2 * m + 1], hi[2 * m + 1]};
          mma_m16n8k16<__half>(r.out[block][j], a, b[m].x, b[m].y);
        }
      }
    }
  }

 private:
  // This lane's words of a token's key.
  static __device__ __forceinline__ void read_keys(uint32_t (&words)[Query::kWords], const unsigned char* stage,
                                                   int row, int t) {
    if constexpr (Query::kWords == 2) {
      const uint2 v = read8(stage + 16 * RowSwizzle::of(row * kKeyChunks + t / 2, row) + 8 * (t % 2));
      words[0] = v.x, words[1] = v.y;
    } else {
#pragma unroll
      for (int i = 0; i < Query::kWords; i += 4) {
        const uint4 v = read16(stage + 16 * RowSwizzle::of(row * kKeyChunks + (t * Query::kWords + i) / 4, row));
        words[i] = v.x, words[i + 1] = v.y, words[i + 2] = v.z, words[i + 3] = v.w;
      }
    }
  }
  // fp16 values of this lane's four tokens.
  static __device__ __forceinline__ void token_values(float (&v)[4], const unsigned char* from) {
    const uint2 both = read8(from);
    v[0] = bits_to_float<__half>(both.x), v[1] = bits_to_float<__half>(both.x >> 16);
    v[2] = bits_to_float<__half>(both.y), v[3] = bits_to_float<__half>(both.y >> 16);
  }
};

}  // namespace hf_fastpath::attn
