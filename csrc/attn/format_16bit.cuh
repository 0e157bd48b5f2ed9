// Decode attention over keys and values as the model has them: the static cache, and what other formats keep in full
// precision. Products with keys are exact, weights are rounded to the model's dtype.
#pragma once

#include "../common/ptx.cuh"
#include "softmax.cuh"
#include "stage.cuh"

namespace hf_fastpath::attn {

// Query heads as B fragments: lane t has channels 32 * block + 8 * t and the 7 behind.
template <typename T, int kPadded>
struct Query16 {
  uint32_t b[kPadded / 32][4];
  float factor[2];

  __device__ __forceinline__ void load(const SharedQuery<kPadded>& shared, float to_score, int lane) {
#pragma unroll
    for (int block = 0; block < kPadded / 32; ++block) {
      const uint4 v = shared.chunk(lane / 4, block * 32 + lane % 4 * 8);
      b[block][0] = v.x, b[block][1] = v.y, b[block][2] = v.z, b[block][3] = v.w;
    }
    factor[0] = factor[1] = to_score;
  }
};

// Products of 16 tokens, given by read(row, chunk): 8 channels of a token.
template <typename T, int kPadded, typename Read>
__device__ __forceinline__ void multiply_keys16(float (&products)[4], const Query16<T, kPadded>& q, Read read,
                                                int lane) {
  const int g = lane / 4, t = lane % 4;
  float part[2][4] = {};  // two sums, since each waits for its last product
#pragma unroll
  for (int block = 0; block < kPadded / 32; ++block) {
    const uint4 lo = read(g, block * 4 + t), hi = read(g + 8, block * 4 + t);
    const uint32_t first[4] = {lo.x, hi.x, lo.y, hi.y}, second[4] = {lo.z, hi.z, lo.w, hi.w};
    mma_m16n8k16<T>(part[0], first, q.b[block][0], q.b[block][1]);
    mma_m16n8k16<T>(part[1], second, q.b[block][2], q.b[block][3]);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) products[i] = part[0][i] + part[1][i];
}

// A tile's weights as B fragments: tokens 2t, 2t + 1 and 2t + 8, 2t + 9 of head g.
template <typename T>
__device__ __forceinline__ uint2 weight_fragment(const float (&weights)[4], float lo, float hi) {
  return make_uint2(transpose_8x8(pack_floats(weights[0] * lo, weights[1] * lo, T())),
                    transpose_8x8(pack_floats(weights[2] * hi, weights[3] * hi, T())));
}

// out += V^T p^T, `width` channels a block (see Running).
template <typename T, int kBlocks, typename Read>
__device__ __forceinline__ void multiply_values16(float (&out)[kBlocks][4][4], uint2 weights, Read read, int lane) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    uint4 row[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) row[i] = read(2 * t + i % 2 + 8 * (i / 2), block, g);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const auto word = [&](int i) { return j == 0 ? row[i].x : j == 1 ? row[i].y : j == 2 ? row[i].z : row[i].w; };
      const uint32_t a[4] = {__byte_perm(word(0), word(1), 0x5410), __byte_perm(word(0), word(1), 0x7632),
                             __byte_perm(word(2), word(3), 0x5410), __byte_perm(word(2), word(3), 0x7632)};
      mma_m16n8k16<T>(out[block][j], a, weights.x, weights.y);
    }
  }
}

// kWhole: heads have kPadded channels.
template <typename T_, int kPadded_, bool kWhole, typename Tuning_>
struct StaticFormat {
  using T = T_;
  using Tuning = Tuning_;
  static constexpr int kPadded = kPadded_, kTile = 16, kTiles = 1, kBlocks = kPadded / 64;
  static constexpr bool kHasFull = false, kMinima = false, kSlots = false;
  static constexpr uint32_t kAllPresent = 0xffff;
  static constexpr int kRowChunks = kPadded / 8, kSideBytes = kTile * kPadded * 2, kStageBytes = 2 * kSideBytes;
  using Query = Query16<T, kPadded>;
  using Order = PlainQuery;
  using State = Running<kBlocks, kMinima>;

  static __device__ __forceinline__ int token(int, int g, int h) { return g + 8 * h; }
  static __device__ __forceinline__ int block_width(int) { return 64; }
  static __device__ __forceinline__ int quads(const AttnDecodeArgs& a) { return (kWhole ? kPadded : a.dim) / 4; }

  const unsigned char *keys, *values;
  int row_bytes;
  RowCopy<kTile, kRowChunks, kWhole, KeySwizzle> key_copy;
  RowCopy<kTile, kRowChunks, kWhole, ValueSwizzle> value_copy;

  __device__ __forceinline__ StaticFormat(const AttnDecodeArgs& a, int64_t pair, int lane)
      : key_copy(lane), value_copy(lane) {
    row_bytes = 2 * (kWhole ? kPadded : a.dim);
    const int64_t offset = pair * a.capacity * row_bytes;
    keys = static_cast<const unsigned char*>(a.keys.data) + offset;
    values = static_cast<const unsigned char*>(a.values.data) + offset;
  }
  // Nothing but time depends on it, so heads of other sizes go without.
  __device__ __forceinline__ void prefetch(int tile, int lane) const {
    constexpr int kLines = kTile * kPadded * 2 / 128;
    const int64_t offset = int64_t{tile} * kTile * row_bytes;
    if constexpr (kWhole && kLines % 16 == 0) prefetch_lines<kLines>(keys + offset, values + offset, lane);
  }
  __device__ __forceinline__ void copy(unsigned char* stage, int tile, int coded, int lane) const {
    const int64_t offset = int64_t{tile} * kTile * row_bytes;
    const int there = coded - tile * kTile;
    key_copy.run(stage, keys + offset, row_bytes, there, lane);
    value_copy.run(stage + kSideBytes, values + offset, row_bytes, there, lane);
  }
  // Puts 8 channels of a key or value (side 0 or 1) into row `row` of a tile, of those that `lane` has of a row.
  static __device__ __forceinline__ void put(unsigned char* stage, int side, int row, int lane, const uint4& channels) {
    const int chunk = row * kRowChunks + lane;
    const int place = side ? ValueSwizzle::of(chunk, row) : KeySwizzle::of(chunk, row);
    *reinterpret_cast<uint4*>(stage + side * kSideBytes + 16 * place) = channels;
  }
  __device__ __forceinline__ void scores(float (&s)[kTiles][4], const unsigned char* stage, const Query& q, uint32_t,
                                         int lane) const {
    const auto read = [&](int row, int chunk) {
      return read16(stage + 16 * KeySwizzle::of(row * kRowChunks + chunk, row));
    };
    multiply_keys16(s[0], q, read, lane);
  }
  __device__ __forceinline__ void add_values(State& r, const float (&weights)[kTiles][4], const float (&rescale)[2],
                                             const unsigned char* stage, uint32_t, int lane) const {
    const float unit = rescale_output(r, rescale, kOneExponent);
    const auto read = [&](int row, int block, int g) {
      return read16(stage + kSideBytes + 16 * ValueSwizzle::of(row * kRowChunks + block * 8 + g, row));
    };
    multiply_values16<T>(r.out, weight_fragment<T>(weights[0], unit, unit), read, lane);
  }
};

}  // namespace hf_fastpath::attn
