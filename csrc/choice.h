// The host entry points of the kernels that choose tokens; see kernels.h.
#pragma once

#include "kernels.h"

namespace hf_fastpath {

// ---- choose_tokens.cu -----------------------------------------------------------------------------------------------
struct ChooseTokensArgs {
  const void* scores;  // (rows, vocabulary), rows score_row_stride elements apart
  int64_t score_row_stride;
  const float* noise;  // (rows, vocabulary) contiguous, with float32 scores only; or nullptr
  const int64_t* end;  // (end_count,), or nullptr: then neither unfinished nor done is read or written
  int end_count;
  const int64_t* pad;
  int64_t *ids, *positions, *unfinished;  // (rows,)
  int64_t* done;    // the number of a call << 48 | how many tokens had been chosen as the last row was finished << 24
  int64_t* report;  // gets *done | *count, with `end`; may be in the host's memory
  int64_t* tokens;  // (rows, capacity), rows token_row_stride elements apart
  int64_t token_row_stride, capacity;
  int64_t* count;
  uint64_t* parts;  // (rows, choose_tokens_parts()) to work with
  int rows, vocabulary;
};
int choose_tokens_parts(int rows, int vocabulary, int sm_count);
cudaError_t launch_choose_tokens(const ChooseTokensArgs& args, Dtype dtype, int sm_count, cudaStream_t stream);

// ---- sampling_weights.cu --------------------------------------------------------------------------------------------
struct SamplingThreshold {
  uint64_t key;
  float largest;  // of the scaled logits
  int unused;
};
struct SamplingWeightsArgs {
  const void* logits;  // (rows, vocabulary), rows row_stride elements apart
  int64_t row_stride;
  float* out;      // (rows, vocabulary) contiguous
  float factor;    // 1 / temperature
  int top_k;       // 0: all
  double removed;  // 1 - top_p, rounded to float32; 0: nothing
  float min_p;
  SamplingThreshold* thresholds;  // (rows,) to work with
  int rows, vocabulary;
};
constexpr int kMaxSamplingVocabulary = 1 << 18;
cudaError_t launch_sampling_weights(const SamplingWeightsArgs& args, Dtype dtype, cudaStream_t stream);

}  // namespace hf_fastpath
