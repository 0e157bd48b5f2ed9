// How much attention each key gets: the weights softmax(scaling * Q K^T) summed over the queries, which no product with
// values needs and no library gives. Softmax's sums are known (lse), so a CTA takes 64 or 128 keys, walks over a
// head's queries, and adds in their order: deterministic, without a matrix of weights in memory.
//
// S^T = K Q^T on tensor cores, keys as rows, whose fragments stay in registers. Where a lane's columns of a fragment
// come from is free as long as both operands agree, so that a lane reads 16 neighbouring bytes.
#include "common/launch.cuh"
#include "common/memory.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "kernels.h"

namespace hf_fastpath {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kQueries = 64;  // of a tile
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kMinusInfinity = -__builtin_huge_valf();

template <int kPaddedDim>
struct Shape {
  static constexpr int kKeyTiles = kPaddedDim == 256 ? 1 : 2;  // of 16 keys, of a warp
  static constexpr int kKeys = kWarps * kKeyTiles * 16;
  static constexpr int kSteps = kPaddedDim / 32;      // of 32 channels
  static constexpr int kPitch = 2 * kPaddedDim + 64;  // bytes of a query in shared memory; 64: no bank conflicts
};

template <int kPaddedDim>
struct Tile {
  unsigned char queries[kQueries * Shape<kPaddedDim>::kPitch];
};

// Tile `index` of the queries of a head: asynchronous copies, a group of their own; zeros where there is nothing.
template <int kPaddedDim>
__device__ __forceinline__ void load_tile(Tile<kPaddedDim>& tile, const AttnReceivedArgs& p, int64_t row, int first) {
  constexpr int kChunks = kPaddedDim / 8;
  const unsigned char* queries = static_cast<const unsigned char*>(p.query) + row * p.tokens * p.dim * 2;
  for (int i = threadIdx.x; i < kQueries * kChunks; i += kThreads) {
    const int query = i / kChunks, chunk = i % kChunks;
    const bool valid = first + query < p.tokens && 8 * chunk < p.dim;
    const int64_t offset = valid ? (static_cast<int64_t>(first + query) * p.dim + 8 * chunk) * 2 : 0;
    cp_async16(tile.queries + query * Shape<kPaddedDim>::kPitch + 16 * chunk, queries + offset, valid);
  }
  cp_async_commit();
}

// A fragments of a warp's keys.
template <int kPaddedDim>
struct Keys {
  uint4 lo[Shape<kPaddedDim>::kKeyTiles][Shape<kPaddedDim>::kSteps];  // of key g: channels 32 s + 8 t and on
  uint4 hi[Shape<kPaddedDim>::kKeyTiles][Shape<kPaddedDim>::kSteps];  // of key g + 8

  __device__ __forceinline__ void load(const AttnReceivedArgs& p, int64_t pair, int first, int lane) {
    const unsigned char* keys = static_cast<const unsigned char*>(p.key) + pair * p.keys * p.dim * 2;
#pragma unroll
    for (int tile = 0; tile < Shape<kPaddedDim>::kKeyTiles; ++tile) {
#pragma unroll
      for (int s = 0; s < Shape<kPaddedDim>::kSteps; ++s) {
        const int channel = 32 * s + 8 * (lane % 4), key = first + 16 * tile + lane / 4;
        lo[tile][s] = hi[tile][s] = make_uint4(0, 0, 0, 0);
        if (channel >= p.dim) continue;
        if (key < p.keys) lo[tile][s] = load_early16(keys + (static_cast<int64_t>(key) * p.dim + channel) * 2);
        if (key + 8 < p.keys) hi[tile][s] = load_early16(keys + (static_cast<int64_t>(key + 8) * p.dim + channel) * 2);
      }
    }
  }
};

template <typename T, int kPaddedDim>
__device__ __forceinline__ void multiply(float (&scores)[Shape<kPaddedDim>::kKeyTiles][4], const Keys<kPaddedDim>& keys,
                                         const Tile<kPaddedDim>& tile, int query, int lane) {
  const unsigned char* row = tile.queries + (query + lane / 4) * Shape<kPaddedDim>::kPitch + 16 * (lane % 4);
#pragma unroll
  for (int s = 0; s < Shape<kPaddedDim>::kSteps; ++s) {
    const uint4 b = *reinterpret_cast<const uint4*>(row + 64 * s);
#pragma unroll
    for (int i = 0; i < Shape<kPaddedDim>::kKeyTiles; ++i) {
      const uint4 &lo = keys.lo[i][s], &hi = keys.hi[i][s];
      const uint32_t first[4] = {lo.x, hi.x, lo.y, hi.y}, second[4] = {lo.z, hi.z, lo.w, hi.w};
      mma_m16n8k16<T>(scores[i], first, b.x, b.y);
      mma_m16n8k16<T>(scores[i], second, b.z, b.w);
    }
  }
}

// Whether a query may attend to a key, of those that there are. Old keys come first.
__device__ __forceinline__ bool visible(const AttnReceivedArgs& p, int64_t batch, int64_t pair, int key, int query) {
  if (key - p.old_keys > query) return false;
  if (p.mask == nullptr) return true;
  const uint8_t* row = p.mask + batch * p.mask_stride_batch + static_cast<int64_t>(query) * p.mask_stride_query;
  const bool old = key < p.old_keys;
  return row[old ? p.positions[pair * p.position_stride + key] : p.first + key - p.old_keys];
}

constexpr int kBlocks = 4;  // of 8 queries, that are computed together

template <typename T, int kPaddedDim>
__global__ void __launch_bounds__(kThreads) attn_received_kernel(const __grid_constant__ AttnReceivedArgs p) {
  using S = Shape<kPaddedDim>;
  Tile<kPaddedDim>* tiles = reinterpret_cast<Tile<kPaddedDim>*>(dynamic_shared());
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t batch = blockIdx.z, row = batch * p.heads + blockIdx.y;
  const int64_t pair = batch * p.kv_heads + blockIdx.y / (p.heads / p.kv_heads);
  const int first_key = blockIdx.x * S::kKeys + warp * S::kKeyTiles * 16, stop_key = (blockIdx.x + 1) * S::kKeys;
  const float factor = p.scaling * kLog2E;
  // Queries before the first key of the CTA see none of its keys.
  const int first_tile = max(static_cast<int>(blockIdx.x) * S::kKeys - p.old_keys, 0) / kQueries;
  const int stop_tile = (p.tokens + kQueries - 1) / kQueries;
  Keys<kPaddedDim> keys;
  keys.load(p, pair, first_key, lane);
  float received[S::kKeyTiles][2] = {};
  if (first_tile < stop_tile) load_tile(tiles[first_tile % 2], p, row, first_tile * kQueries);
  for (int tile = first_tile; tile < stop_tile; ++tile) {
    if (tile + 1 < stop_tile) {
      load_tile(tiles[(tile + 1) % 2], p, row, (tile + 1) * kQueries);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    // Most tiles: no key is hidden from a query, none is missing.
    const bool whole = p.mask == nullptr && tile * kQueries >= stop_key - p.old_keys && stop_key <= p.keys;
#pragma unroll 1
    for (int n = 0; n < kQueries; n += 8 * kBlocks) {
      const int first_query = tile * kQueries + n + 2 * t;  // of the lane: two of each 8
      float offset[kBlocks][2];
#pragma unroll
      for (int i = 0; i < 2 * kBlocks; ++i) {
        const int query = first_query + 8 * (i / 2) + i % 2;
        const float lse = query < p.tokens ? p.lse[row * p.lse_stride + query] : kMinusInfinity;
        // A query without a visible key gives nothing: exp2(-inf) = 0.
        offset[i / 2][i % 2] = lse > kMinusInfinity ? lse * -kLog2E : kMinusInfinity;
      }
      float scores[kBlocks][S::kKeyTiles][4] = {};
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        multiply<T, kPaddedDim>(scores[block], keys, tiles[tile % 2], n + 8 * block, lane);
      }
#pragma unroll
      for (int i = 0; i < kBlocks * S::kKeyTiles * 4; ++i) {
        const int block = i / (4 * S::kKeyTiles), key_tile = i / 4 % S::kKeyTiles, half = i % 4 / 2, column = i % 2;
        float weight = exp2f(fmaf(scores[block][key_tile][2 * half + column], factor, offset[block][column]));
        if (!whole) {
          const int key = first_key + 16 * key_tile + g + 8 * half, query = first_query + 8 * block + column;
          const bool counts = key < p.keys && query < p.tokens && visible(p, batch, pair, key, query);
          weight = counts ? weight : 0.0f;
        }
        received[key_tile][half] += weight;
      }
    }
    __syncthreads();  // the tile may be filled again
  }
#pragma unroll
  for (int tile = 0; tile < S::kKeyTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = received[tile][half];
      sum += __shfl_xor_sync(kFullWarp, sum, 1);
      sum += __shfl_xor_sync(kFullWarp, sum, 2);
      const int key = first_key + 16 * tile + g + 8 * half;
      if (t == 0 && key < p.keys) p.out[row * p.keys + key] = sum;
    }
  }
}

template <typename T, int kPaddedDim>
cudaError_t launch(const AttnReceivedArgs& p, cudaStream_t stream) {
  const dim3 grid((p.keys + Shape<kPaddedDim>::kKeys - 1) / Shape<kPaddedDim>::kKeys, p.heads, p.batch);
  return launch_kernel_with_shared(attn_received_kernel<T, kPaddedDim>, grid, kThreads, 2 * sizeof(Tile<kPaddedDim>),
                                   stream, p);
}

template <typename T>
cudaError_t launch_for_dim(const AttnReceivedArgs& p, cudaStream_t stream) {
  if (p.dim <= 64) return launch<T, 64>(p, stream);
  if (p.dim <= 128) return launch<T, 128>(p, stream);
  return launch<T, 256>(p, stream);
}

}  // namespace

cudaError_t launch_attn_received(const AttnReceivedArgs& args, Dtype dtype, cudaStream_t stream) {
  if (dtype == Dtype::kFloat16) return launch_for_dim<__half>(args, stream);
  return launch_for_dim<__nv_bfloat16>(args, stream);
}

}  // namespace hf_fastpath
