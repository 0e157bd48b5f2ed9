// Products of packed int4 weights, by the kernel for one row where that takes them, else by that for 1..16.
#pragma once

#include "int4_weights.cuh"
#include "one_row.cuh"

namespace hf_fastpath::linear {

template <typename W, Epilogue kEpilogue>
cudaError_t launch_int4(const Params<typename W::T>& p, int sm_count, cudaStream_t stream) {
  if (p.norm_weight && !normalizes_itself<W>(p)) return cudaErrorInvalidValue;
  const int blocks = (p.row_tiles + kRowTiles<kEpilogue> - 1) / kRowTiles<kEpilogue>;
  const int grid = std::min(blocks, 2 * sm_count);
  if constexpr (OneRowMemory<W, kEpilogue>::Ring::kFits) {
    if (takes_one_row<W, kEpilogue>(p, grid)) return launch_one_row<W, kEpilogue>(p, grid, stream);
  }
  if constexpr (kEpilogue == Epilogue::kBias) {
    return launch_plain<W>(p, sm_count, stream);
  } else {
    return launch_fused<W, kEpilogue>(p, sm_count, stream);
  }
}

}  // namespace hf_fastpath::linear
