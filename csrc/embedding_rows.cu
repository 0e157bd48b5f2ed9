// Rows of an embedding table: the first kernel of a step, which lets the next ones come as near as they can.
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "kernels.h"

namespace hf_fastpath {
namespace {

constexpr int kThreads = 128;

// A CTA takes kThreads vectors of a token's row.
__global__ void __launch_bounds__(kThreads) embedding_rows_kernel(const EmbeddingRowsArgs a) {
  const int vector = blockIdx.x * kThreads + threadIdx.x;
  wait_for_previous_kernel();
  let_next_kernel_begin();
  const int64_t token = a.ids[blockIdx.y];
  if (token < 0 || token >= a.vocabulary) __trap();
  if (vector >= a.row_vectors) return;
  const int64_t row = blockIdx.y;
  static_cast<uint4*>(a.y)[row * a.row_vectors + vector] =
      static_cast<const uint4*>(a.weight)[token * a.row_vectors + vector];
}

}  // namespace

cudaError_t launch_embedding_rows(const EmbeddingRowsArgs& args, cudaStream_t stream) {
  const dim3 grid((args.row_vectors + kThreads - 1) / kThreads, args.rows);
  return launch_kernel_early_if_possible(embedding_rows_kernel, grid, kThreads, stream, args);
}

}  // namespace hf_fastpath
