// The choice of tokens on CUDA: argument checks, dispatch on the dtype, launch (see ops_checks.h).
#include <torch/csrc/stable/library.h>

#include "choice.h"
#include "ops_checks.h"

namespace hf_fastpath {
namespace {

Dtype scores_dtype(const Check& check, const Tensor& scores) {
  return scores.scalar_type() == ScalarType::Float ? Dtype::kFloat32 : check.float_dtype(scores, "what is chosen by");
}

// int64, contiguous, beside the scores.
int64_t* integers(const Check& check, const Tensor& scores, const Tensor& t, const char* name) {
  check.dtype(t, ScalarType::Long, name, "int64");
  check.contiguous(t, name);
  check.same_device(scores, t, name);
  return static_cast<int64_t*>(t.data_ptr());
}

// int64, in memory that the GPU may write, be it the host's.
int64_t* reported_to(const Check& check, const Tensor& t) {
  check.dtype(t, ScalarType::Long, "report", "int64");
  cudaPointerAttributes found = {};
  const bool known = cudaPointerGetAttributes(&found, t.data_ptr()) == cudaSuccess;
  check(known && found.devicePointer != nullptr, "report must be on the GPU or in the host's pinned memory, got ", t);
  return static_cast<int64_t*>(found.devicePointer);
}

void check_noise(const Check& check, const Tensor& scores, const Tensor& noise) {
  check.dtype(scores, ScalarType::Float, "scores with noise", "float32");
  check.dtype(noise, ScalarType::Float, "noise", "float32");
  check.shape(noise, {scores.size(0), scores.size(1)}, "noise", "(B, V)");
  check.contiguous(scores, "scores with noise");
  check.contiguous(noise, "noise");
  check.same_device(scores, noise, "noise");
}

void choose_tokens(const Tensor& scores, const std::optional<Tensor>& noise, const std::optional<Tensor>& end,
                   const std::optional<Tensor>& pad, const Tensor& ids, const Tensor& positions,
                   const Tensor& unfinished, const Tensor& done, const Tensor& tokens, const Tensor& count,
                   const Tensor& report) {
  constexpr Check check{"choose_tokens"};
  check.shape(scores, {-1, -1}, "scores", "(B, V)");
  const Dtype dtype = scores_dtype(check, scores);
  const int64_t rows = scores.size(0), vocabulary = scores.size(1);
  check(vocabulary >= 1 && vocabulary <= kMaxInt && rows <= 65535, "scores are too many, or none: ", scores);
  check(scores.stride(1) == 1 || vocabulary == 1, "the last dimension of scores must be contiguous");
  if (noise) check_noise(check, scores, *noise);
  check(!end || pad, "end needs pad");
  check.shape(ids, {rows, 1}, "ids", "(B, 1)");
  check.shape(positions, {rows, 1}, "positions", "(B, 1)");
  check.shape(unfinished, {rows}, "unfinished", "(B,)");
  check.shape(tokens, {rows, -1}, "tokens", "(B, capacity)");
  check.shape(count, {1, 1}, "count", "(1, 1)");
  check.dtype(tokens, ScalarType::Long, "tokens", "int64");
  check(tokens.stride(1) == 1 || tokens.size(1) == 1, "the last dimension of tokens must be contiguous");
  check.same_device(scores, tokens, "tokens");
  check(tokens.size(1) < 1 << 24, "tokens may have 2^24 - 1 columns at most, got ", tokens);
  check.shape(done, {}, "done", "()");
  check.shape(report, {}, "report", "()");
  ChooseTokensArgs args = {};
  if (end) {
    check.shape(*end, {-1}, "end", "(E,)");
    check.shape(*pad, {}, "pad", "()");
    args.end = integers(check, scores, *end, "end");
    args.end_count = static_cast<int>(end->size(0));
    args.pad = integers(check, scores, *pad, "pad");
  }
  args.ids = integers(check, scores, ids, "ids");
  args.positions = integers(check, scores, positions, "positions");
  args.unfinished = integers(check, scores, unfinished, "unfinished");
  args.done = integers(check, scores, done, "done");
  args.count = integers(check, scores, count, "count");
  args.report = reported_to(check, report);
  if (rows == 0) return;
  const Launch launch(scores);
  args.scores = data(scores);
  args.score_row_stride = scores.stride(0);
  args.noise = data<float>(noise);
  args.tokens = static_cast<int64_t*>(tokens.data_ptr());
  args.token_row_stride = tokens.stride(0);
  args.capacity = tokens.size(1);
  args.rows = static_cast<int>(rows);
  args.vocabulary = static_cast<int>(vocabulary);
  const int parts = choose_tokens_parts(args.rows, args.vocabulary, launch.sm_count());
  const Tensor best = launch.empty({rows, parts}, ScalarType::Long);
  args.parts = static_cast<uint64_t*>(best.data_ptr());
  check.launched(launch_choose_tokens(args, dtype, launch.sm_count(), launch.stream()));
}

Tensor sampling_weights(const Tensor& logits, double temperature, int64_t top_k, double top_p, double min_p) {
  constexpr Check check{"sampling_weights"};
  check.shape(logits, {-1, -1}, "logits", "(B, V)");
  const Dtype dtype = scores_dtype(check, logits);
  const int64_t rows = logits.size(0), vocabulary = logits.size(1);
  check(vocabulary >= 1 && vocabulary <= kMaxSamplingVocabulary && rows <= 65535, "logits must be (B, V) with V up to ",
        kMaxSamplingVocabulary, ", got ", logits);
  check(logits.stride(1) == 1 || vocabulary == 1, "the last dimension of logits must be contiguous");
  check(temperature > 0 && top_k >= 0 && top_p >= 0 && top_p <= 1 && min_p >= 0 && min_p <= 1,
        "temperature must be positive, top_k at least 0, top_p and min_p between 0 and 1");
  const Launch launch(logits);
  Tensor weights = launch.empty({rows, vocabulary}, ScalarType::Float);
  if (rows == 0) return weights;
  const Tensor thresholds = launch.empty({rows, 2}, ScalarType::Long);
  const SamplingWeightsArgs args{data(logits),
                                 logits.stride(0),
                                 static_cast<float*>(weights.data_ptr()),
                                 1.0f / static_cast<float>(temperature),
                                 static_cast<int>(top_k < vocabulary ? top_k : 0),
                                 static_cast<float>(1.0 - top_p),
                                 static_cast<float>(min_p),
                                 static_cast<SamplingThreshold*>(thresholds.data_ptr()),
                                 static_cast<int>(rows),
                                 static_cast<int>(vocabulary)};
  check.launched(launch_sampling_weights(args, dtype, launch.stream()));
  return weights;
}

}  // namespace
}  // namespace hf_fastpath

STABLE_TORCH_LIBRARY_IMPL(hf_fastpath, CUDA, m) {
  m.impl("choose_tokens", TORCH_BOX(&hf_fastpath::choose_tokens));
  m.impl("sampling_weights", TORCH_BOX(&hf_fastpath::sampling_weights));
}
