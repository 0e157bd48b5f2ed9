// What the launchers of the appending kernels share: which instance of a kernel serves a call.
#pragma once

#include <algorithm>

#include "../common/launch.cuh"
#include "rows.cuh"

namespace hf_fastpath::kv {

// Up to so many tokens a CTA takes all of a KV head, and counts them itself; more are spread over CTAs, none of which
// may count, since the others read the count.
constexpr int kFewTokens = 8;

inline bool rows_are_aligned(const KvRows& rows) {
  return aligned_to(rows.data, 16) && rows.stride_batch % 8 == 0 && rows.stride_head % 8 == 0 &&
         rows.stride_token % 8 == 0;
}

inline bool can_vectorize(const KvNewTokens& p) {
  for (const KvRows& rows : {p.query, p.key, p.value}) {
    if (!rows_are_aligned(rows)) return false;
  }
  for (const KvAngles& angles : {p.cos, p.sin}) {
    if (!aligned_to(angles.data, 16) || angles.stride_batch % 8 || angles.stride_token % 8) return false;
  }
  return aligned_to(p.q_norm, 16) && aligned_to(p.k_norm, 16);
}

// Calls launch(T(), lanes of a row, whether loads are vectors), the last two as constants.
template <typename T, typename Launch>
cudaError_t for_row_shape(const KvNewTokens& p, const Launch& launch) {
  if (!can_vectorize(p)) return launch(T(), std::integral_constant<int, 32>(), std::false_type());
  if (p.dim <= 64) return launch(T(), std::integral_constant<int, 8>(), std::true_type());
  if (p.dim <= 128) return launch(T(), std::integral_constant<int, 16>(), std::true_type());
  return launch(T(), std::integral_constant<int, 32>(), std::true_type());
}
template <typename Launch>
cudaError_t for_row_shape(const KvNewTokens& p, Dtype dtype, const Launch& launch) {
  return dtype == Dtype::kFloat16 ? for_row_shape<__half>(p, launch) : for_row_shape<__nv_bfloat16>(p, launch);
}

constexpr int kChunkThreads = 128;
constexpr int kChunkRows = 2;  // of a lane: so many loads are under way at once

// kv_finish_chunk.cu: the queries of a prompt chunk, and the count, of `count_stride` integers a head. Launched behind
// the kernel that stores the chunk, which reads the count.
cudaError_t launch_finish_chunk(const KvNewTokens& p, Dtype dtype, int count_stride, cudaStream_t stream);

}  // namespace hf_fastpath::kv
