// Attention of one new token a row over an int8 KV cache, read as int8.
//
// Split over the sequence (Flash-Decoding): a CTA takes one split of one KV head for up to 8 of its query heads, its
// warps take tiles of 16 tokens in turn, and attn_combine_kernel adds the splits in their order. Both products run on
// tensor cores: S = K q^T with 16 tokens as rows, O^T = V^T p^T with 16 dimensions as rows, query heads as the 8
// columns of both, so that the heads of a group share every byte read. Where a lane's columns of a fragment come from
// is free as long as both operands agree, so K and V are loaded 16 bytes a lane and never rearranged.
//
// Precision: int8 is exact in fp16. The query is scaled by a power of two to fp16's upper range, which is exact for
// values within 2^-28 of its largest. Softmax is fp32. A token's weight p * v_scale is divided by the largest one so
// far (`unit` below) and rounded to fp16: relative error 2^-11, and what is lost below fp16's range is 2^-25 of the
// largest. A sum of weights is 0 only where every token is masked; a NaN in the query makes it, and the result, NaN.
#include <algorithm>

#include "common/dequant.cuh"
#include "common/launch.cuh"
#include "common/memory.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "kernels.h"

namespace hf_fastpath {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kTileTokens = 16;
constexpr int kHeadsPerCta = 8;
constexpr int kMaxSplits = 64;
constexpr float kMinusInfinity = -__builtin_huge_valf();
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kSmallestUnit = 1e-30f;  // keeps the division by `unit` finite when every weight is 0

struct SplitParams {
  AttnDecodeArgs a;
  float* partial;      // (batch, heads, splits, dim): sum of weight * value, relative to the split's maximum
  float2* statistics;  // (batch, heads, splits): maximum score in log2 units, sum of weights
  int splits, groups;  // groups of up to 8 query heads a KV head
  int64_t split_tokens;
};

// Shapes that follow from the head dimension, padded to 64, 128 or 256. K: a lane reads kKBlocks runs of 16 bytes of
// two tokens. V: kVBlocks runs of 4 * kVWords bytes of four tokens.
template <int kPaddedDim>
struct Shape {
  static constexpr int kKBlocks = kPaddedDim / 64;
  static constexpr int kVWords = kPaddedDim == 64 ? 2 : 4;
  static constexpr int kVBlocks = kPaddedDim == 256 ? 2 : 1;
  static constexpr int kOutTiles = kVBlocks * kVWords * 2;  // m16n8 tiles of the output: two a word
};

// Query heads as B fragments in K's order of dimensions, and for the lane's two score columns the factor that takes a
// product of integers to log2 units.
template <int kPaddedDim>
struct Query {
  uint32_t b[Shape<kPaddedDim>::kKBlocks][4][2];
  float factor[2];
};

template <typename T, int kPaddedDim>
__device__ __forceinline__ void load_query(Query<kPaddedDim>& q, const T* heads, int head_count, int dim, float scaling,
                                           int lane) {
  constexpr int kKBlocks = Shape<kPaddedDim>::kKBlocks;
  const int g = lane / 4, t = lane % 4;
  float values[kKBlocks][16];
  float largest = 0.0f;
#pragma unroll
  for (int block = 0; block < kKBlocks; ++block) {
    const int first = block * 64 + t * 16;
    const bool exists = g < head_count && first < dim;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      values[block][i] = exists ? to_float(heads[static_cast<int64_t>(g) * dim + first + i]) : 0.0f;
      largest = fmaxf(largest, fabsf(values[block][i]));
    }
  }
  largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, 1));
  largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, 2));
  // ilogbf of 0 and of infinity are out of range; then the power is 1. Two factors, since 2^(13 - e) may overflow.
  const bool normal = largest > 0.0f && largest < __builtin_huge_valf();
  const int exponent = normal ? 13 - ilogbf(largest) : 0;
#pragma unroll
  for (int block = 0; block < kKBlocks; ++block) {
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      float* v = &values[block][4 * word];
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = ldexpf(v[i], exponent);
      q.b[block][word][0] = pack_floats(v[0], v[2], __half());  // int8_pair() gives bytes 0 and 2, then 1 and 3
      q.b[block][word][1] = pack_floats(v[1], v[3], __half());
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {  // the column's head is another lane's g
    q.factor[i] = ldexpf(scaling * kLog2E, -__shfl_sync(kFullWarp, exponent, (2 * t + i) * 4));
  }
}

// A tile's K bytes of tokens g and g + 8.
template <int kPaddedDim>
struct KeyTile {
  uint4 bytes[Shape<kPaddedDim>::kKBlocks][2];
};

// A tile's V words of tokens 2t, 2t + 1, 2t + 8, 2t + 9.
template <int kPaddedDim>
struct ValueTile {
  uint32_t words[Shape<kPaddedDim>::kVBlocks][Shape<kPaddedDim>::kVWords][4];
};

// What the scores of tokens g and g + 8 need. A token that is masked or beyond the split is `absent` and has scales 0:
// the cache may hold anything there.
struct TokenScales {
  float key[2], value[2];
  bool present[2];
};

template <int kPaddedDim>
__device__ __forceinline__ void load_keys(KeyTile<kPaddedDim>& k, const int8_t* data, int64_t first, int64_t stop,
                                          int dim, int lane) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int block = 0; block < Shape<kPaddedDim>::kKBlocks; ++block) {
    const int offset = block * 64 + t * 16;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t token = first + g + 8 * i;
      k.bytes[block][i] = make_uint4(0, 0, 0, 0);
      if (token < stop && offset < dim) k.bytes[block][i] = load_once16(data + token * dim + offset);
    }
  }
}

template <int kPaddedDim>
__device__ __forceinline__ void load_values(ValueTile<kPaddedDim>& v, const int8_t* data, int64_t first, int64_t stop,
                                            int dim, int lane) {
  constexpr int kVWords = Shape<kPaddedDim>::kVWords;
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int block = 0; block < Shape<kPaddedDim>::kVBlocks; ++block) {
    const int offset = block * 128 + g * 4 * kVWords;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t token = first + 2 * t + i % 2 + 8 * (i / 2);
      const bool exists = token < stop && offset < dim;
      uint4 run = make_uint4(0, 0, 0, 0);
      if constexpr (kVWords == 4) {
        if (exists) run = load_once16(data + token * dim + offset);
      } else if (exists) {
        const uint2 half = load_once8(data + token * dim + offset);
        run.x = half.x, run.y = half.y;
      }
      const uint32_t words[4] = {run.x, run.y, run.z, run.w};
#pragma unroll
      for (int word = 0; word < kVWords; ++word) v.words[block][word][i] = words[word];
    }
  }
}

__device__ __forceinline__ TokenScales load_scales(const __half* key_scale, const __half* value_scale,
                                                   const uint8_t* mask, int64_t first, int64_t stop, int lane) {
  TokenScales s;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t token = first + lane / 4 + 8 * i;
    s.present[i] = token < stop && (mask == nullptr || mask[token]);
    s.key[i] = s.present[i] ? __half2float(key_scale[token]) : 0.0f;
    s.value[i] = s.present[i] ? __half2float(value_scale[token]) : 0.0f;
  }
  return s;
}

// A warp's running softmax for the lane's two query heads (columns 2t and 2t + 1): maximum score in log2 units, this
// lane's share of the sum of weights, and the largest weight * v_scale, all relative to the maximum; and the output
// tiles in multiples of `unit`.
template <int kPaddedDim>
struct Running {
  float max[2] = {kMinusInfinity, kMinusInfinity};
  float sum[2] = {};
  float unit[2] = {};
  float out[Shape<kPaddedDim>::kOutTiles][4] = {};
};

// Scores of a tile: element i is token g + 8 * (i / 2), head 2t + i % 2.
template <int kPaddedDim>
__device__ __forceinline__ void multiply_keys(float (&scores)[4], const KeyTile<kPaddedDim>& k,
                                              const Query<kPaddedDim>& q, const TokenScales& s) {
  float products[4] = {};
#pragma unroll
  for (int block = 0; block < Shape<kPaddedDim>::kKBlocks; ++block) {
    const uint4 &lo = k.bytes[block][0], &hi = k.bytes[block][1];
    const uint32_t lo_words[4] = {lo.x, lo.y, lo.z, lo.w}, hi_words[4] = {hi.x, hi.y, hi.z, hi.w};
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      const uint32_t a[4] = {int8_pair<__half>(lo_words[word]), int8_pair<__half>(hi_words[word]),
                             int8_pair<__half>(lo_words[word] >> 8), int8_pair<__half>(hi_words[word] >> 8)};
      mma_m16n8k16<__half>(products, a, q.b[block][word][0], q.b[block][word][1]);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    scores[i] = s.present[i / 2] ? products[i] * s.key[i / 2] * q.factor[i % 2] : kMinusInfinity;
  }
}

// Takes a tile's scores into the running maximum and sum, rescales the output, and returns the weights as B fragments
// (tokens 2t, 2t + 1 and 2t + 8, 2t + 9 of head g).
template <int kPaddedDim>
__device__ __forceinline__ uint2 update_softmax(Running<kPaddedDim>& r, const float (&scores)[4],
                                                const TokenScales& s) {
  float weights[4], rescale[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const float new_max = fmaxf(r.max[j], max_over_g(fmaxf(scores[j], scores[j + 2])));
    const float finite_max = new_max == kMinusInfinity ? 0.0f : new_max;  // all masked so far: exp2(-inf) = 0
    const float correction = exp2f(r.max[j] - finite_max);
    const float p_lo = exp2f(scores[j] - finite_max), p_hi = exp2f(scores[j + 2] - finite_max);
    r.sum[j] = r.sum[j] * correction + p_lo + p_hi;
    weights[j] = p_lo * s.value[0];
    weights[j + 2] = p_hi * s.value[1];
    const float old_unit = r.unit[j] * correction;
    r.unit[j] = fmaxf(fmaxf(old_unit, max_over_g(fmaxf(weights[j], weights[j + 2]))), kSmallestUnit);
    r.max[j] = new_max;
    const float inverse = __frcp_rn(r.unit[j]);
    rescale[j] = r.unit[j] == old_unit ? 1.0f : old_unit * inverse;  // exactly 1: x * (1 / x) may be off by a bit
    weights[j] *= inverse;
    weights[j + 2] *= inverse;
  }
  if (__any_sync(kFullWarp, rescale[0] != 1.0f || rescale[1] != 1.0f)) {
#pragma unroll
    for (auto& tile : r.out) {
#pragma unroll
      for (int i = 0; i < 4; ++i) tile[i] *= rescale[i % 2];
    }
  }
  return make_uint2(transpose_8x8(pack_floats(weights[0], weights[1], __half())),
                    transpose_8x8(pack_floats(weights[2], weights[3], __half())));
}

// out += V^T p^T. Output tile 2 * word + half: row g is byte 2 * half of the lanes' word, row g + 8 the next byte.
template <int kPaddedDim>
__device__ __forceinline__ void multiply_values(Running<kPaddedDim>& r, const ValueTile<kPaddedDim>& v, uint2 weights) {
  constexpr int kVWords = Shape<kPaddedDim>::kVWords;
#pragma unroll
  for (int block = 0; block < Shape<kPaddedDim>::kVBlocks; ++block) {
#pragma unroll
    for (int word = 0; word < kVWords; ++word) {
      const uint32_t (&w)[4] = v.words[block][word];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // Bytes 0, 1 (or 2, 3) of two tokens side by side: int8_pair() then picks one dimension of both.
        const uint32_t lo = __byte_perm(w[0], w[1], half ? 0x7632 : 0x5410);
        const uint32_t hi = __byte_perm(w[2], w[3], half ? 0x7632 : 0x5410);
        const uint32_t a[4] = {int8_pair<__half>(lo), int8_pair<__half>(lo >> 8), int8_pair<__half>(hi),
                               int8_pair<__half>(hi >> 8)};
        mma_m16n8k16<__half>(r.out[(block * kVWords + word) * 2 + half], a, weights.x, weights.y);
      }
    }
  }
}

// The warps' results, relative to the largest maximum of the CTA.
template <int kPaddedDim>
struct Shared {
  float out[kWarps][kHeadsPerCta][kPaddedDim];
  float max[kWarps][kHeadsPerCta], sum[kWarps][kHeadsPerCta];
};

template <int kPaddedDim>
__device__ __forceinline__ void share_result(Shared<kPaddedDim>& shared, Running<kPaddedDim>& r, int warp, int lane) {
  constexpr int kVWords = Shape<kPaddedDim>::kVWords;
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    r.sum[j] = sum_over_g(r.sum[j]);
    if (g == 0) shared.max[warp][2 * t + j] = r.max[j];
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    float largest = kMinusInfinity;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, shared.max[w][2 * t + j]);
    const float correction = largest == kMinusInfinity ? 0.0f : exp2f(r.max[j] - largest);
    if (g == 0) shared.sum[warp][2 * t + j] = r.sum[j] * correction;
    const float unit = r.unit[j] * correction;
#pragma unroll
    for (int tile = 0; tile < Shape<kPaddedDim>::kOutTiles; ++tile) {
      const int dim = tile / (2 * kVWords) * 128 + g * 4 * kVWords + tile % (2 * kVWords) * 2;
      shared.out[warp][2 * t + j][dim] = r.out[tile][j] * unit;
      shared.out[warp][2 * t + j][dim + 1] = r.out[tile][j + 2] * unit;
    }
  }
  __syncthreads();
}

// Adds the warps in their order and stores: the result itself when there is one split, else the split's part of it.
template <typename T, int kPaddedDim>
__device__ __forceinline__ void store_result(const Shared<kPaddedDim>& shared, const SplitParams& p, int64_t first_head,
                                             int head_count, int split) {
  for (int i = threadIdx.x; i < head_count * p.a.dim; i += kThreads) {
    const int head = i / p.a.dim, dim = i % p.a.dim;
    float out = 0.0f, sum = 0.0f, largest = kMinusInfinity;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      out += shared.out[w][head][dim];
      sum += shared.sum[w][head];
      largest = fmaxf(largest, shared.max[w][head]);
    }
    const int64_t row = first_head + head;
    if (p.splits == 1) {
      static_cast<T*>(p.a.out)[row * p.a.dim + dim] = from_float<T>(sum != 0.0f ? out / sum : 0.0f);
    } else {
      p.partial[(row * p.splits + split) * p.a.dim + dim] = out;
      if (dim == 0) p.statistics[row * p.splits + split] = make_float2(largest, sum);
    }
  }
}

template <typename T, int kPaddedDim>
__global__ void __launch_bounds__(kThreads) attn_decode_int8_kernel(const SplitParams p) {
  __shared__ Shared<kPaddedDim> shared;
  const AttnDecodeArgs& a = p.a;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int split = blockIdx.x, kv_head = blockIdx.y / p.groups, group = blockIdx.y % p.groups;
  const int64_t batch = blockIdx.z;
  const int ratio = a.heads / a.kv_heads;
  const int head_count = min(kHeadsPerCta, ratio - group * kHeadsPerCta);
  const int64_t first_head = batch * a.heads + kv_head * ratio + group * kHeadsPerCta;
  const int64_t cache_row = (batch * a.kv_heads + kv_head) * a.capacity;
  const int8_t* k_data = a.k_data + cache_row * a.dim;
  const int8_t* v_data = a.v_data + cache_row * a.dim;
  const __half* k_scale = static_cast<const __half*>(a.k_scale) + cache_row;
  const __half* v_scale = static_cast<const __half*>(a.v_scale) + cache_row;
  const uint8_t* mask = a.mask ? a.mask + batch * a.mask_row_stride : nullptr;

  Query<kPaddedDim> query;
  load_query<T>(query, static_cast<const T*>(a.query) + first_head * a.dim, head_count, a.dim, a.scaling, lane);
  Running<kPaddedDim> running;
  const int64_t stop = min(a.length, (split + 1) * p.split_tokens);
  for (int64_t first = split * p.split_tokens + warp * kTileTokens; first < stop; first += kWarps * kTileTokens) {
    KeyTile<kPaddedDim> keys;
    ValueTile<kPaddedDim> values;
    load_keys(keys, k_data, first, stop, a.dim, lane);
    const TokenScales scales = load_scales(k_scale, v_scale, mask, first, stop, lane);
    load_values(values, v_data, first, stop, a.dim, lane);
    float scores[4];
    multiply_keys(scores, keys, query, scales);
    const uint2 weights = update_softmax(running, scores, scales);
    multiply_values(running, values, weights);
  }
  share_result(shared, running, warp, lane);
  store_result<T>(shared, p, first_head, head_count, split);
}

// One CTA a (batch, head), one thread a dimension.
template <typename T>
__global__ void __launch_bounds__(kMaxKvDim) attn_combine_kernel(const SplitParams p) {
  __shared__ float factors[kMaxSplits];
  const int64_t row = blockIdx.x;
  const float2* statistics = p.statistics + row * p.splits;
  float largest = kMinusInfinity;
  for (int s = 0; s < p.splits; ++s) largest = fmaxf(largest, statistics[s].x);
  for (int s = threadIdx.x; s < p.splits; s += blockDim.x) {
    factors[s] = largest == kMinusInfinity ? 0.0f : exp2f(statistics[s].x - largest);
  }
  __syncthreads();
  if (threadIdx.x >= p.a.dim) return;
  const float* partial = p.partial + row * p.splits * p.a.dim + threadIdx.x;
  float out = 0.0f, sum = 0.0f;
#pragma unroll 8
  for (int s = 0; s < p.splits; ++s) {
    out = fmaf(partial[static_cast<int64_t>(s) * p.a.dim], factors[s], out);
    sum = fmaf(statistics[s].y, factors[s], sum);
  }
  static_cast<T*>(p.a.out)[row * p.a.dim + threadIdx.x] = from_float<T>(sum != 0.0f ? out / sum : 0.0f);
}

// Short sequences are cut finely to fill the GPU, long ones coarsely, since every split costs a partial result.
int64_t split_tokens(int64_t length) {
  int64_t tokens = kTileTokens * kWarps;
  while (length > std::min(tokens * tokens / 4, tokens * kMaxSplits)) tokens *= 2;
  return tokens;
}

template <typename T, int kPaddedDim>
cudaError_t launch(const SplitParams& p, cudaStream_t stream) {
  const dim3 grid(p.splits, p.a.kv_heads * p.groups, p.a.batch);
  const cudaError_t error = launch_kernel(attn_decode_int8_kernel<T, kPaddedDim>, grid, kThreads, stream, p);
  if (error != cudaSuccess || p.splits == 1) return error;
  return launch_kernel(attn_combine_kernel<T>, p.a.batch * p.a.heads, (p.a.dim + 31) / 32 * 32, stream, p);
}

template <typename T>
cudaError_t launch_for_dim(const SplitParams& p, cudaStream_t stream) {
  if (p.a.dim <= 64) return launch<T, 64>(p, stream);
  if (p.a.dim <= 128) return launch<T, 128>(p, stream);
  return launch<T, 256>(p, stream);
}

}  // namespace

int attn_decode_splits(int64_t length) {
  const int64_t tokens = split_tokens(length);
  return static_cast<int>((length + tokens - 1) / tokens);
}

int64_t attn_decode_scratch_floats(int64_t batch, int64_t heads, int64_t dim, int64_t length) {
  const int splits = attn_decode_splits(length);
  return splits == 1 ? 0 : batch * heads * splits * (dim + 2);
}

cudaError_t launch_attn_decode_int8(const AttnDecodeArgs& args, Dtype dtype, cudaStream_t stream) {
  SplitParams p{args, args.scratch, nullptr, attn_decode_splits(args.length), 0, split_tokens(args.length)};
  p.groups = (args.heads / args.kv_heads + kHeadsPerCta - 1) / kHeadsPerCta;
  // dim is even, so the float2 part of the scratch stays aligned to 8 bytes.
  p.statistics = reinterpret_cast<float2*>(args.scratch + int64_t{args.batch} * args.heads * p.splits * args.dim);
  if (dtype == Dtype::kFloat16) return launch_for_dim<__half>(p, stream);
  return launch_for_dim<__nv_bfloat16>(p, stream);
}

}  // namespace hf_fastpath
