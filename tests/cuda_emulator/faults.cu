// Small kernels for the emulator's own tests; with a fault when asked for one.
#include "common/launch.cuh"
#include "common/memory.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace hf_fastpath {
namespace {

enum Fault {
  kNone,
  kMissingBarrier,
  kBarrierInBranch,
  kEndBeforeBarrier,
  kTwoBarriers,
  kReadBefore,
  kReadBeyond,
  kWriteBeyond,
  kWriteInput,
  kMisaligned,
  kReadUndefined,
  kReadUndefinedOutput,
  kShuffleFromEnded,
  kShuffleFromOutside,
  kMaskWithoutSelf,
  kRaceOfCtas,
  kArrayIndex,
  kOverflow,
  kSharedBeyond,
  kOverwriteEarly,
  kNoWait,
  kNeverWait,
  kOneGroupTooFew,
  kWriteUnderCopy,
  kCopyMisaligned,
  kNoBarrierBeforeTicket,
  kNoBarrierAfterTicket,
  kNotTheLast,
};

// out[i] = in[n - 1 - i] by way of shared memory; n = 64 threads a CTA, two CTAs.
__global__ void reverse_kernel(const int* in, int* out, int fault) {
  __shared__ int values[64];
  const int n = 64, thread = threadIdx.x, first = blockIdx.x * n;
  const bool chosen = thread == 37;
  int local[2] = {in[first + thread], 0};
  if (fault == kReadBefore && chosen) local[0] = in[-1];
  if (fault == kReadBeyond && chosen) local[0] = in[2 * n];
  if (fault == kWriteBeyond && chosen) out[2 * n] = 1;
  if (fault == kWriteInput && chosen) const_cast<int*>(in)[0] = 1;
  if (fault == kMisaligned && chosen) local[0] = load_once8(in + 1).x;
  if (fault == kReadUndefinedOutput && chosen) local[0] = out[0];
  if (fault == kArrayIndex && chosen) local[in[0] + 2] = 1;
  if (fault == kOverflow && chosen) local[0] = 2147483647 + in[1];
  if (fault == kRaceOfCtas && chosen) out[0] = 1;
  if (fault != kReadUndefined || !chosen) values[thread] = local[0];
  if (fault == kSharedBeyond && chosen) *(values + n + in[0]) = 1;
  if (fault == kEndBeforeBarrier && chosen) return;
  if (fault == kBarrierInBranch) {
    if (!chosen) __syncthreads();
  } else if (fault == kTwoBarriers && chosen) {
    __syncthreads();
  } else if (fault != kMissingBarrier) {
    __syncthreads();
  }
  out[first + thread] = values[n - 1 - thread];
  if (fault == kOverwriteEarly && chosen) values[n - 1] = 0;
}

// out[i] = the sum of in[32 * (i / 32) ...] over the warp.
__global__ void warp_sum_kernel(const int* in, int* out, int fault) {
  const int lane = threadIdx.x % 32;
  int sum = in[threadIdx.x];
  if (fault == kShuffleFromEnded && lane == 5) return;
  const unsigned mask = fault == kMaskWithoutSelf ? 0xfffffffeu : fault == kShuffleFromOutside ? 0xffffu : 0xffffffffu;
  for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(mask, sum, offset);
  out[threadIdx.x] = sum;
}

// Rows of 32 values: the four shuffles in parts of 8 lanes, and two votes.
__global__ void shuffles_kernel(const int* in, int* out) {
  const int lane = threadIdx.x, value = in[lane];
  out[lane] = __shfl_sync(kFullWarp, value, 11, 8);
  out[32 + lane] = __shfl_xor_sync(kFullWarp, value, 12, 8);
  out[64 + lane] = __shfl_down_sync(kFullWarp, value, 3, 8);
  out[96 + lane] = __shfl_up_sync(kFullWarp, value, 3, 8);
  out[128 + lane] = static_cast<int>(__ballot_sync(kFullWarp, value % 2));
  out[160 + lane] = __any_sync(kFullWarp, value == 1000);
}

// out[i] = in[i] of the lane's neighbour, by way of shared memory and a warp's own barrier.
__global__ void neighbour_kernel(const int* in, int* out, int fault) {
  __shared__ int values[64];
  values[threadIdx.x] = in[threadIdx.x];
  if (fault != kMissingBarrier) __syncwarp();
  out[threadIdx.x] = values[threadIdx.x ^ 1];
}

// out[i] = in[i ^ 4] of 256 integers, by cp.async in two groups; the second half of the first group is zeros.
__global__ void async_copy_kernel(const int* in, int* out, int fault) {
  int* values = reinterpret_cast<int*>(dynamic_shared());
  const int thread = threadIdx.x;
  cp_async16(values + 4 * thread, in + 4 * thread, thread < 16);
  cp_async_commit();
  cp_async16_once(values + 128 + 4 * thread, in + 128 + 4 * thread + (fault == kCopyMisaligned), evict_first_policy());
  cp_async_commit();
  if (fault == kWriteUnderCopy) values[4 * thread] = 1;
  if (fault != kNoWait && fault != kNeverWait) cp_async_wait<1>();
  if (fault != kMissingBarrier) __syncthreads();
  for (int i = 4 * thread; i < 4 * thread + 4 && fault != kNeverWait; ++i) out[i] = values[i ^ 4];
  if (fault == kNeverWait) return;
  if (fault != kOneGroupTooFew) cp_async_wait<0>();
  __syncthreads();
  for (int i = 128 + 4 * thread; i < 128 + 4 * thread + 4; ++i) out[i] = values[i ^ 4];
}

// Each CTA copies its 64 numbers; the last one adds up all of them. The counter is 0 before and after.
__global__ void last_cta_kernel(const int* in, int* counter, int* copy, int* out, int fault) {
  __shared__ uint32_t ticket;
  const int thread = threadIdx.x, last = static_cast<int>(gridDim.x) - 1;
  copy[blockIdx.x * 64 + thread] = in[blockIdx.x * 64 + thread];
  if (fault != kNoBarrierBeforeTicket) __syncthreads();
  if (thread == 0) ticket = draw_ticket(reinterpret_cast<uint32_t*>(counter), last);
  if (fault == kNoBarrierAfterTicket) __syncwarp();
  if (fault != kNoBarrierAfterTicket) __syncthreads();
  const bool adds = fault == kNotTheLast ? ticket == 0 : fault == kNoBarrierAfterTicket || ticket == last;
  if (!adds || (fault == kNoBarrierAfterTicket && blockIdx.x != last)) return;
  int sum = 0;
  for (unsigned cta = 0; cta < gridDim.x; ++cta) sum += copy[cta * 64 + thread];
  out[thread] = sum;
}

// c (16, 8) = a (16, 16) * b (16, 8), row-major, fragments gathered as the PTX ISA lists them.
template <typename T>
__global__ void mma_kernel(const uint16_t* a, const uint16_t* b, float* c) {
  const int group = threadIdx.x >> 2, in_group = threadIdx.x % 4;
  uint32_t fa[4] = {}, fb[2] = {};
  for (int i = 0; i < 8; ++i) {
    const int row = (i < 2 || (i >= 4 && i < 6)) ? group : group + 8;
    const int col = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
    fa[i / 2] |= static_cast<uint32_t>(a[row * 16 + col]) << (16 * (i & 1));
  }
  for (int i = 0; i < 4; ++i) {
    const int row = in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0);
    fb[i / 2] |= static_cast<uint32_t>(b[row * 8 + group]) << (16 * (i & 1));
  }
  float fc[4] = {};
  mma_m16n8k16<T>(fc, fa, fb[0], fb[1]);
  for (int i = 0; i < 4; ++i) c[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = fc[i];
}

__global__ void transpose_kernel(const uint32_t* in, uint32_t* out) {
  out[threadIdx.x] = transpose_8x8(in[threadIdx.x]);
}

}  // namespace
}  // namespace hf_fastpath

using namespace hf_fastpath;

EXPORT int run_reverse(const int* in, int* out, int fault) {
  return launch_kernel(reverse_kernel, 2, 64, nullptr, in, out, fault);
}
EXPORT int run_warp_sum(const int* in, int* out, int fault) {
  return launch_kernel(warp_sum_kernel, 1, 64, nullptr, in, out, fault);
}
EXPORT int run_shuffles(const int* in, int* out) {
  return launch_kernel(shuffles_kernel, 1, 32, nullptr, in, out);
}
EXPORT int run_neighbour(const int* in, int* out, int fault) {
  return launch_kernel(neighbour_kernel, 1, 64, nullptr, in, out, fault);
}
EXPORT int run_async_copy(const int* in, int* out, int fault) {
  return launch_kernel_with_shared(async_copy_kernel, 1, 32, 256 * 4, nullptr, in, out, fault);
}
EXPORT int run_last_cta(const int* in, int* counter, int* copy, int* out, int ctas, int fault) {
  return launch_kernel(last_cta_kernel, ctas, 64, nullptr, in, counter, copy, out, fault);
}
EXPORT int run_mma(const uint16_t* a, const uint16_t* b, float* c, int bfloat16) {
  return launch_kernel(bfloat16 ? mma_kernel<__nv_bfloat16> : mma_kernel<__half>, 1, 32, nullptr, a, b, c);
}
EXPORT int run_transpose(const uint32_t* in, uint32_t* out) {
  return launch_kernel(transpose_kernel, 1, 32, nullptr, in, out);
}
EXPORT int run_threads(const int* in, int* out, int threads) {
  return launch_kernel(neighbour_kernel, 1, threads, nullptr, in, out, 0);
}
