// Small kernels with barriers in shared memory and warpgroup products, for the emulator's own tests; with a fault when
// asked for one.
#include "common/launch.cuh"
#include "common/memory.cuh"
#include "common/ptx_sm90.cuh"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace hf_fastpath {
namespace {

enum PipelineFault {
  kNone,
  kNoFullWait,
  kNoEmptyWait,
  kNoInitBarrier,
  kMissingArrival,
  kNoArrivalOfCopies,
  kArriveBeforeReading,
};

// out = in, 16 rounds of 256 bytes through a ring of two stages: one warp stores half of each and copies the other
// half, one warp reads.
__global__ void pipeline_kernel(const int* in, int* out, int fault) {
  int* values = reinterpret_cast<int*>(dynamic_shared());
  uint64_t* full = reinterpret_cast<uint64_t*>(values + 128);
  uint64_t* empty = full + 2;
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) mbarrier_init(full + i, 33), mbarrier_init(empty + i, 1);
    fence_mbarrier_init();
  }
  if (fault != kNoInitBarrier) __syncthreads();
  for (int round = 0; round < 16; ++round) {
    const int stage = round % 2, parity = round / 2 % 2;
    int* ring = values + 64 * stage;
    if (threadIdx.x < 32) {
      if (fault != kNoEmptyWait) mbarrier_wait(empty + stage, parity ^ 1);
      if (lane < 8) cp_async16(ring + 4 * lane, in + 64 * round + 4 * lane);
      if (fault != kNoArrivalOfCopies) {
        mbarrier_arrive_after_copies(full + stage);
      } else {
        mbarrier_arrive(full + stage);
      }
      ring[32 + lane] = in[64 * round + 32 + lane];
      __syncwarp();
      if (lane == 0 && fault != kMissingArrival) mbarrier_arrive(full + stage);
    } else {
      if (fault != kNoFullWait) mbarrier_wait(full + stage, parity);
      if (fault == kArriveBeforeReading && lane == 0) mbarrier_arrive(empty + stage);
      out[64 * round + lane] = ring[lane];
      out[64 * round + 32 + lane] = ring[32 + lane];
      __syncwarp();
      if (fault != kArriveBeforeReading && lane == 0) mbarrier_arrive(empty + stage);
    }
  }
}

enum WgmmaFault { kNoFault, kNoProxyFence, kNoFence, kNoWait, kChangedFragment, kEarlyStore, kNeverWait };

// c (64, 32) = 2 * a (64, 64) * b (32, 64).T, row-major, in two groups of two products; b is stored as
// wgmma_descriptor() says.
template <typename T>
__global__ void wgmma_kernel(const uint16_t* a, const uint16_t* b, float* c, int fault) {
  unsigned char* operand = dynamic_shared();
  for (int i = threadIdx.x; i < 32 * 64; i += 128) {
    const int byte = i * 2;
    *reinterpret_cast<uint16_t*>(operand + (byte ^ (byte / 8 & 0x70))) = b[i];
  }
  if (fault != kNoProxyFence) fence_proxy_async();
  __syncthreads();
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  uint32_t fragments[4][4];
  for (int k = 0; k < 4; ++k) {
    for (int i = 0; i < 4; ++i) {
      const int row = 16 * warp + g + 8 * (i % 2), col = 16 * k + 8 * (i / 2) + 2 * t;
      fragments[k][i] = a[64 * row + col] | static_cast<uint32_t>(a[64 * row + col + 1]) << 16;
    }
  }
  float sum[4][4];
  for (int k = 0; k < 4; ++k) {
    if (k % 2 == 0 && fault != kNoFence) wgmma_fence();
    wgmma_m64k16<T>(sum, fragments[k], wgmma_descriptor(operand) + 2 * k, k != 0);
    if (k % 2) wgmma_commit();
  }
  if (fault == kNeverWait) return;
  if (fault == kChangedFragment) fragments[3][0] ^= 1u << threadIdx.x % 7;
  if (fault == kEarlyStore) __syncthreads(), operand[2 * threadIdx.x] = 0;
  wgmma_wait<1>();
  if (fault != kNoWait) wgmma_wait<0>();
  for (int i = 0; i < 16; ++i) {
    c[32 * (16 * warp + g + 8 * (i / 2 % 2)) + i / 4 * 8 + 2 * t + i % 2] = 2 * sum[i / 4][i % 4];
  }
  wgmma_wait<0>();
}

enum BoxFault {
  kNoBoxFault,
  kNoExpectedBytes,
  kNoStoreFence,
  kNoWaitForStores,
  kOverwrittenSource,
  kMisalignedBox,
  kBarrierOfAnother,
};

// out (cols, rows) = in (rows, cols).T, both up to 64 x 64 and aligned: loaded as a box, transposed by 8 x 8, stored as
// a box.
__global__ void box_kernel(const __grid_constant__ TensorMap in, const __grid_constant__ TensorMap out, int fault) {
  unsigned char* loaded = dynamic_shared();
  unsigned char* stored = loaded + 64 * 128;
  uint64_t* full = reinterpret_cast<uint64_t*>(stored + 64 * 128);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = threadIdx.x / 128;
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expecting(full, fault == kNoExpectedBytes ? 0 : 64 * 128);
    tensor_load(loaded + (fault == kMisalignedBox ? 128 : 0), in, 0, 0, full);
  }
  mbarrier_wait(full, 0);
  // Warp w transposes rows 8w ... 8w + 7 (of 8 warps): four blocks at a time.
  for (int half = 0; half < 2; ++half) {
    uint32_t blocks[4];
    for (int i = 0; i < 4; ++i) {
      const int row = 8 * warp + lane / 4, chunk = 4 * half + i;
      blocks[i] = *reinterpret_cast<uint32_t*>(loaded + row * 128 + (chunk ^ row % 8) * 16 + lane % 4 * 4);
    }
    const int row = 32 * half + lane;
    store_transposed_8x8x4(stored + row * 128 + (warp ^ row % 8) * 16, blocks);
  }
  if (fault != kNoStoreFence) fence_proxy_async();
  warpgroup_barrier(fault == kBarrierOfAnother ? 1 : 1 + group);
  __syncthreads();
  if (threadIdx.x == 0) {
    tensor_store(out, 0, 0, stored);
    if (fault == kOverwrittenSource) *reinterpret_cast<uint32_t*>(stored) = 0;
    if (fault != kNoWaitForStores) tensor_stores_read();
  }
}

enum ClusterFault { kNoClusterFault, kReadTooEarly, kEndTooEarly, kNoSuchRank, kOneStaysAway, kWriteTooEarly };

// out = in, where each CTA of a cluster copies what the next one has loaded; 16 bytes a thread.
__global__ void cluster_kernel(const float4* in, float4* out, int cluster_size, int fault) {
  float4* own = reinterpret_cast<float4*>(dynamic_shared()) + threadIdx.x;
  const int rank = blockIdx.x % cluster_size, next = (rank + 1) % cluster_size;
  *own = in[blockIdx.x * blockDim.x + threadIdx.x];
  if (fault == kOneStaysAway && blockIdx.x == 1) return;
  if (fault != kReadTooEarly) cluster_barrier();
  const float4 value = load_from_cluster(own, fault == kNoSuchRank ? rank + 1 : next);
  if (fault == kWriteTooEarly) *own = value;
  out[(blockIdx.x - rank + next) * blockDim.x + threadIdx.x] = value;
  if (fault != kEndTooEarly) cluster_barrier();
}

// The same, where each CTA puts what it has loaded where the next one finds it.
__global__ void cluster_store_kernel(const float4* in, float4* out, int cluster_size, int fault) {
  float4* own = reinterpret_cast<float4*>(dynamic_shared()) + threadIdx.x;
  const int rank = blockIdx.x % cluster_size, next = (rank + 1) % cluster_size;
  cluster_arrive();
  const float4 value = in[blockIdx.x * blockDim.x + threadIdx.x];
  cluster_wait();
  store_to_cluster(own, fault == kNoSuchRank ? rank + 1 : next, value);
  if (fault != kReadTooEarly) cluster_barrier();
  const int before = (rank + cluster_size - 1) % cluster_size;
  out[(blockIdx.x - rank + before) * blockDim.x + threadIdx.x] = *own;
}

}  // namespace
}  // namespace hf_fastpath

using namespace hf_fastpath;

EXPORT int run_pipeline(const int* in, int* out, int fault) {
  return launch_kernel_with_shared(pipeline_kernel, 1, 64, 128 * 4 + 4 * 8, nullptr, in, out, fault);
}
EXPORT int run_wgmma(const uint16_t* a, const uint16_t* b, float* c, int fault, int bfloat16) {
  const auto kernel = bfloat16 ? wgmma_kernel<__nv_bfloat16> : wgmma_kernel<__half>;
  return launch_kernel_with_shared(kernel, 1, 128, 32 * 128, nullptr, a, b, c, fault);
}
EXPORT int run_box(const void* in, void* out, int rows, int cols, int fault) {
  TensorMap from, to;
  if (const cudaError_t error = make_tensor_map(&from, in, rows, cols, 2 * cols, 64)) return error;
  if (const cudaError_t error = make_tensor_map(&to, out, cols, rows, 2 * rows, 64)) return error;
  return launch_kernel_with_shared(box_kernel, 1, 256, 2 * 64 * 128 + 8, nullptr, from, to, fault);
}
EXPORT int run_cluster(const void* in, void* out, int ctas, int cluster_size, int fault) {
  return launch_kernel_in_clusters(cluster_kernel, ctas, 64, cluster_size, 64 * 16, nullptr,
                                   static_cast<const float4*>(in), static_cast<float4*>(out), cluster_size, fault);
}
EXPORT int run_cluster_store(const void* in, void* out, int ctas, int cluster_size, int fault) {
  return launch_kernel_in_clusters(cluster_store_kernel, ctas, 64, cluster_size, 64 * 16, nullptr,
                                   static_cast<const float4*>(in), static_cast<float4*>(out), cluster_size, fault);
}
