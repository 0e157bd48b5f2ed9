// The H2O cache: a new token takes the place of the one that got the least attention, in E4M3 with an fp16 scale a
// token. Bit-identical to the reference in hf_fastpath/ops/kv_h2o_append.py.
#include "common/fp8.cuh"
#include "kv/append_tokens.cuh"

namespace hf_fastpath {
namespace {

constexpr int kLeastThreads = 256;  // they look through the slots
constexpr int kMaxWarps = 16;

// What a token is kept by (hf_fastpath/ops/_slots.py), as an integer of the same order; NaN before anything, as in
// torch.argmin. `last`: the new token.
__device__ __forceinline__ uint32_t priority(float score, int position, int first, int last, const KvH2OStorage& s) {
  if (position > last - s.window || (position >= first && position < first + s.sinks)) score = __builtin_huge_valf();
  if (position < first) score = -1.0f;
  if (!(score == score)) return 0;
  score += 0.0f;  // no negative zero
  const uint32_t bits = *reinterpret_cast<uint32_t*>(&score);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

struct H2O {
  using Storage = KvH2OStorage;
  static constexpr int kCountStride = 2;
  struct Row {
    uint2 bytes;
    __half scale;
  };

  // The slot of the new token: the next one, or the lowest of those with the least priority.
  static __device__ __forceinline__ int64_t place(const Storage& s, const KvNewTokens& p, int64_t pair, int stored) {
    __shared__ uint64_t least_of_warp[kMaxWarps];
    if (stored < p.capacity) return stored;
    const int first = p.lengths[pair * kCountStride + 1];
    const float4* scores = reinterpret_cast<const float4*>(s.scores + pair * p.capacity);
    const int4* positions = reinterpret_cast<const int4*>(s.positions + pair * p.capacity);
    uint64_t least = ~uint64_t{0};
    for (int slot = 4 * threadIdx.x; slot < p.capacity; slot += 4 * blockDim.x) {
      const float4 score = scores[slot / 4];
      const int4 position = positions[slot / 4];
      const uint32_t keys[4] = {
          priority(score.x, position.x, first, stored, s), priority(score.y, position.y, first, stored, s),
          priority(score.z, position.z, first, stored, s), priority(score.w, position.w, first, stored, s)};
#pragma unroll
      for (int i = 0; i < 4; ++i) least = min(least, uint64_t{keys[i]} << 32 | static_cast<uint64_t>(slot + i));
    }
#pragma unroll
    for (int offset = 16; offset; offset /= 2) least = min(least, __shfl_xor_sync(kFullWarp, least, offset));
    if (threadIdx.x % 32 == 0) least_of_warp[threadIdx.x / 32] = least;
    __syncthreads();
    for (int warp = 0; warp < blockDim.x / 32; ++warp) least = min(least, least_of_warp[warp]);
    return static_cast<int64_t>(least & 0xffffffffu);
  }

  template <typename T, int kLanes>
  static __device__ __forceinline__ Row quantize(const uint4& x) {
    float v[kv::kPerLane], largest = 0.0f;
    kv::unpack<T>(v, x);
#pragma unroll
    for (float value : v) largest = max_nan(largest, fabsf(value));
    largest = kv::row_max_nan<kLanes>(largest);
    const float scale = power_of_two_scale(largest, -24, 15);  // as fp16 has them
    return {fp8_bits_8(v, scale, largest), __float2half_rn(scale)};
  }
  static __device__ __forceinline__ void store(const Storage& s, kv::Side side, int64_t entry, int dim, int lane,
                                               const Row& row) {
    const KvQuantizedSide& target = side == kv::Side::kKey ? s.key : s.value;
    reinterpret_cast<uint2*>(static_cast<uint8_t*>(target.data) + entry * dim)[lane] = row.bytes;
    if (lane == 0) static_cast<__half*>(target.scale)[entry] = row.scale;
  }
  static __device__ __forceinline__ void finish(const Storage& s, int64_t entry, int stored) {
    s.scores[entry] = 0.0f;
    s.positions[entry] = stored;
  }
};

}  // namespace

cudaError_t launch_kv_h2o_append(const KvNewTokens& tokens, const KvH2OStorage& storage, Dtype dtype,
                                 cudaStream_t stream) {
  return kv::launch_append_few<H2O>(tokens, storage, dtype, kLeastThreads, stream);
}

}  // namespace hf_fastpath
