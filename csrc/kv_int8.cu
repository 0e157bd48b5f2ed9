// int8 keys and values with one fp16 scale a token and head: quantize into the cache, and back to floats.
// Bit-identical to the references in hf_fastpath/ops/kv_int8_append.py and kv_int8_dequantize.py, hence the explicit
// IEEE divisions and roundings: they hold whatever the compiler's fast-math flags are.
#include <algorithm>

#include "common/dtype.cuh"
#include "common/launch.cuh"
#include "common/memory.cuh"
#include "common/reduce.cuh"
#include "kernels.h"

namespace hf_fastpath {
namespace {

constexpr int kThreads = 128;
constexpr int kPerLane = kMaxKvDim / 32;

// Element i of a lane: 8 neighbours when vectorized (lane * 8 + i), else one of each 32.
template <bool kVector>
__device__ __forceinline__ int element(int lane, int i) {
  return kVector ? lane * kPerLane + i : lane + 32 * i;
}

template <typename T, bool kVector>
__device__ __forceinline__ void load_row(float (&values)[kPerLane], const T* row, int dim, int lane) {
  if constexpr (kVector) {
    uint4 bits = make_uint4(0, 0, 0, 0);
    if (lane * kPerLane < dim) bits = __ldg(reinterpret_cast<const uint4*>(row) + lane);
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) values[i] = bits_to_float<T>(words[i / 2] >> (16 * (i % 2)));
  } else {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      values[i] = element<false>(lane, i) < dim ? to_float(row[element<false>(lane, i)]) : 0.0f;
    }
  }
}

// round(x / scale), ties to even, clamped; 0 where the scale is 0 or NaN, and for a NaN quotient (inf / inf).
__device__ __forceinline__ int8_t quantize(float x, float scale) {
  if (!(scale > 0.0f)) return 0;
  const int q = __float2int_rn(__fdiv_rn(x, scale));
  return static_cast<int8_t>(min(max(q, -127), 127));
}

template <bool kVector>
__device__ __forceinline__ void store_row(int8_t* row, const int8_t (&q)[kPerLane], int dim, int lane) {
  if constexpr (kVector) {
    if (lane * kPerLane < dim) reinterpret_cast<uint2*>(row)[lane] = *reinterpret_cast<const uint2*>(q);
  } else {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (element<false>(lane, i) < dim) row[element<false>(lane, i)] = q[i];
    }
  }
}

// One warp a (batch, head, token); blockIdx.y is the side, keys or values.
template <typename T, bool kVector>
__global__ void __launch_bounds__(kThreads) kv_int8_append_kernel(const __grid_constant__ KvAppendArgs p) {
  const KvAppendSide& side = p.sides[blockIdx.y];
  const int lane = threadIdx.x % 32;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (index >= static_cast<int64_t>(p.batch) * p.heads * p.tokens) return;
  const int64_t pair = index / p.tokens, token = index % p.tokens;
  const int64_t batch = pair / p.heads, head = pair % p.heads;
  const T* input = static_cast<const T*>(side.input) + batch * side.stride_batch + head * side.stride_head +
                   token * side.stride_token;

  float values[kPerLane];
  load_row<T, kVector>(values, input, p.dim, lane);
  float largest = 0.0f;
#pragma unroll
  for (float value : values) largest = max_nan(largest, fabsf(value));
  const __half scale = __float2half_rn(__fdiv_rn(warp_max_nan(largest), 127.0f));

  alignas(8) int8_t q[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) q[i] = quantize(values[i], __half2float(scale));
  const int64_t position = pair * p.capacity + p.start + token;
  store_row<kVector>(side.data + position * p.dim, q, p.dim, lane);
  if (lane == 0) static_cast<__half*>(side.scale)[position] = scale;
}

bool can_vectorize(const KvAppendSide& side, int dim) {
  return dim % 8 == 0 && side.stride_batch % 8 == 0 && side.stride_head % 8 == 0 && side.stride_token % 8 == 0 &&
         aligned_to(side.input, 16) && aligned_to(side.data, 8);
}

template <typename T>
cudaError_t launch_append(const KvAppendArgs& a, cudaStream_t stream) {
  const int64_t rows = static_cast<int64_t>(a.batch) * a.heads * a.tokens;
  const dim3 grid(static_cast<unsigned>((rows + kThreads / 32 - 1) / (kThreads / 32)), 2);
  if (can_vectorize(a.sides[0], a.dim) && can_vectorize(a.sides[1], a.dim)) {
    return launch_kernel(kv_int8_append_kernel<T, true>, grid, kThreads, stream, a);
  }
  return launch_kernel(kv_int8_append_kernel<T, false>, grid, kThreads, stream, a);
}

// blockIdx.y walks the (batch, head) pairs, threads the length * dim elements of a pair, kPer of one token at a time.
template <typename T, int kPer>
__global__ void __launch_bounds__(kThreads) kv_int8_dequantize_kernel(const KvDequantizeArgs p) {
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int chunks_per_token = p.dim / kPer;
  if (chunk >= p.length * chunks_per_token) return;
  const int64_t token = chunk / chunks_per_token;
  for (int64_t pair = blockIdx.y; pair < p.pairs; pair += gridDim.y) {
    const float scale = __half2float(static_cast<const __half*>(p.scale)[pair * p.capacity + token]);
    const int8_t* source = p.data + pair * p.capacity * p.dim + chunk * kPer;
    T* target = static_cast<T*>(p.out) + pair * p.length * p.dim + chunk * kPer;
    if constexpr (kPer == 1) {
      *target = from_float<T>(__fmul_rn(*source, scale));
    } else {
      const uint2 packed = load_once8(source);
      const uint32_t words[2] = {packed.x, packed.y};
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t word = words[i / 2] >> (16 * (i % 2));
        const float lo = static_cast<int8_t>(word & 0xff), hi = static_cast<int8_t>((word >> 8) & 0xff);
        pairs[i] = pack_floats(__fmul_rn(lo, scale), __fmul_rn(hi, scale), T());
      }
      *reinterpret_cast<uint4*>(target) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
  }
}

template <typename T, int kPer>
cudaError_t launch_dequantize(const KvDequantizeArgs& a, cudaStream_t stream) {
  const int64_t chunks = a.length * (a.dim / kPer);
  const dim3 grid(static_cast<unsigned>((chunks + kThreads - 1) / kThreads),
                  static_cast<unsigned>(std::min<int64_t>(a.pairs, 65535)));
  return launch_kernel(kv_int8_dequantize_kernel<T, kPer>, grid, kThreads, stream, a);
}

template <typename T>
cudaError_t launch_dequantize_for_alignment(const KvDequantizeArgs& a, cudaStream_t stream) {
  const bool aligned = a.dim % 8 == 0 && aligned_to(a.data, 8) && aligned_to(a.out, 16);
  return aligned ? launch_dequantize<T, 8>(a, stream) : launch_dequantize<T, 1>(a, stream);
}

}  // namespace

cudaError_t launch_kv_int8_append(const KvAppendArgs& args, Dtype dtype, cudaStream_t stream) {
  if (dtype == Dtype::kFloat16) return launch_append<__half>(args, stream);
  return launch_append<__nv_bfloat16>(args, stream);
}

cudaError_t launch_kv_int8_dequantize(const KvDequantizeArgs& args, Dtype dtype, cudaStream_t stream) {
  if (dtype == Dtype::kFloat16) return launch_dequantize_for_alignment<__half>(args, stream);
  return launch_dequantize_for_alignment<__nv_bfloat16>(args, stream);
}

}  // namespace hf_fastpath
