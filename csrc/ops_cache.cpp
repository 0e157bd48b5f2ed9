// What writes and expands the KV caches, on CUDA: argument checks, dispatch on the dtype, launch (see ops_checks.h).
#include <torch/csrc/stable/library.h>

#include "ops_cache_checks.h"

namespace hf_fastpath {
namespace {

// Entries of a storage tensor (B, H_kv, entries, ...); what else its shape must be is checked with the others.
int64_t entries(const Check& check, const Tensor& t, const char* name) {
  check(t.dim() >= 3, name, " must have shape (B, H_kv, entries, ...), got ", t);
  return t.size(2);
}

void kv_static_append(const std::optional<Tensor>& query, const Tensor& key, const Tensor& value,
                      const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm, double eps,
                      const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, bool rotate,
                      const std::optional<Tensor>& query_out, const Tensor& keys, const Tensor& values,
                      const std::optional<Tensor>& lengths) {
  const NewTokens n{{"kv_static_append"}, query, key, value, q_norm, k_norm, eps, cos, sin, rotate, query_out};
  const Dtype dtype = n.checked();
  const int64_t capacity = entries(n.check, keys, "keys");
  n.stored_floats(keys, {capacity, n.dim()}, "keys", "(B, H_kv, capacity, D)");
  n.stored_floats(values, {capacity, n.dim()}, "values", "(B, H_kv, capacity, D)");
  if (lengths) n.stored(*lengths, ScalarType::Int, "int32", {}, "lengths", "(B, H_kv)");
  n.check(lengths || n.tokens() <= capacity, "there is room for ", capacity, " tokens, got ", n.tokens());
  if (n.empty()) return;
  const Launch launch(key);
  const KvStaticStorage storage{keys.data_ptr(), values.data_ptr()};
  n.check.launched(launch_kv_static_append(n.args(capacity, lengths), storage, dtype, launch.stream()));
}

void kv_int8_append(const std::optional<Tensor>& query, const Tensor& key, const Tensor& value,
                    const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm, double eps,
                    const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, bool rotate,
                    const std::optional<Tensor>& query_out, const Tensor& k_data, const Tensor& k_scale,
                    const Tensor& v_data, const Tensor& v_scale, const Tensor& lengths) {
  const NewTokens n{{"kv_int8_append"}, query, key, value, q_norm, k_norm, eps, cos, sin, rotate, query_out};
  const Dtype dtype = n.checked();
  const int64_t capacity = entries(n.check, k_data, "k_data");
  n.stored(k_data, ScalarType::Char, "int8", {capacity, n.dim()}, "k_data", "(B, H_kv, capacity, D)");
  n.stored(k_scale, ScalarType::Half, "float16", {capacity}, "k_scale", "(B, H_kv, capacity)");
  n.stored(v_data, ScalarType::Char, "int8", {capacity, n.dim()}, "v_data", "(B, H_kv, capacity, D)");
  n.stored(v_scale, ScalarType::Half, "float16", {capacity}, "v_scale", "(B, H_kv, capacity)");
  n.stored(lengths, ScalarType::Int, "int32", {}, "lengths", "(B, H_kv)");
  if (n.empty()) return;
  const Launch launch(key);
  const KvInt8Storage storage{{k_data.data_ptr(), k_scale.data_ptr()}, {v_data.data_ptr(), v_scale.data_ptr()}};
  n.check.launched(launch_kv_int8_append(n.args(capacity, lengths), storage, dtype, launch.stream()));
}

void kv_fp8_append(const std::optional<Tensor>& query, const Tensor& key, const Tensor& value,
                   const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm, double eps,
                   const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, bool rotate,
                   const std::optional<Tensor>& query_out, const Tensor& k_data, const Tensor& k_scale,
                   const Tensor& k_tail, const Tensor& v_data, const Tensor& v_scale, const Tensor& v_tail,
                   const Tensor& lengths) {
  const NewTokens n{{"kv_fp8_append"}, query, key, value, q_norm, k_norm, eps, cos, sin, rotate, query_out};
  const Dtype dtype = n.checked();
  const int64_t capacity = entries(n.check, k_data, "k_data");
  n.check(capacity % kFp8Group == 0, "the capacity ", capacity, " must be a multiple of ", kFp8Group);
  for (const auto& [data, scale, tail] : {std::tie(k_data, k_scale, k_tail), std::tie(v_data, v_scale, v_tail)}) {
    n.stored(data, ScalarType::Float8_e4m3fn, "float8_e4m3fn", {capacity, n.dim()}, "k_data and v_data",
             "(B, H_kv, capacity, D)");
    n.stored(scale, ScalarType::Float, "float32", {capacity / kFp8Group}, "k_scale and v_scale",
             "(B, H_kv, capacity / 64)");
    n.stored_floats(tail, {kFp8Group, n.dim()}, "k_tail and v_tail", "(B, H_kv, 64, D)");
  }
  n.stored(lengths, ScalarType::Int, "int32", {}, "lengths", "(B, H_kv)");
  if (n.empty()) return;
  const Launch launch(key);
  const KvGroupedStorage storage{{{k_data.data_ptr(), k_scale.data_ptr()}, {v_data.data_ptr(), v_scale.data_ptr()}},
                                 {{k_tail.data_ptr(), nullptr}, {v_tail.data_ptr(), nullptr}},
                                 kFp8Group,
                                 0,
                                 0};
  n.check.launched(launch_kv_fp8_append(n.args(capacity, lengths), storage, dtype, launch.stream()));
}

// The four tensors of a side of an int4 cache, in a group's size and number of sinks.
void check_int4_side(const NewTokens& n, const Tensor& data, const Tensor& params, const Tensor& tail,
                     const Tensor& sinks, int64_t groups, int64_t group, int64_t sink_count, bool values) {
  const int64_t dim = n.dim(), parts = kv_int4_value_parts(static_cast<int>(dim));
  if (values) {
    n.stored(data, ScalarType::Byte, "uint8", {groups * group / 8, dim, 4}, "v_data", "(B, H_kv, capacity / 8, D, 4)");
    n.stored(params, ScalarType::Half, "float16", {groups, 2, parts, group}, "v_params",
             "(B, H_kv, capacity / group, 2, parts, group)");
  } else {
    n.stored(data, ScalarType::Byte, "uint8", {groups * group, dim / 2}, "k_data", "(B, H_kv, capacity, D / 2)");
    n.stored(params, ScalarType::Half, "float16", {groups, 2, dim}, "k_params", "(B, H_kv, capacity / group, 2, D)");
  }
  n.stored_floats(tail, {group, dim}, "k_tail and v_tail", "(B, H_kv, group, D)");
  n.stored_floats(sinks, {sink_count, dim}, "k_sinks and v_sinks", "(B, H_kv, sinks, D)");
}

void check_int4_dim(const Check& check, int64_t dim) {
  check(dim >= 8 && dim <= kMaxKvDim && dim / kv_int4_value_parts(static_cast<int>(dim)) % 8 == 0,
        "takes head dimensions up to ", kMaxKvDim,
        " whose equal parts of at most 64 channels are multiples of 8 channels, got ", dim);
}

void kv_int4_append(const std::optional<Tensor>& query, const Tensor& key, const Tensor& value,
                    const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm, double eps,
                    const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, bool rotate,
                    const std::optional<Tensor>& query_out, const Tensor& k_data, const Tensor& k_params,
                    const Tensor& k_tail, const Tensor& k_sinks, const Tensor& v_data, const Tensor& v_params,
                    const Tensor& v_tail, const Tensor& v_sinks, const Tensor& lengths) {
  const NewTokens n{{"kv_int4_append"}, query, key, value, q_norm, k_norm, eps, cos, sin, rotate, query_out};
  const Dtype dtype = n.checked();
  check_int4_dim(n.check, n.dim());
  const int64_t groups = entries(n.check, k_params, "k_params"), group = entries(n.check, k_tail, "k_tail");
  const int64_t sinks = entries(n.check, k_sinks, "k_sinks");
  n.check(group == 32 || group == 64, "groups must have 32 or 64 tokens, got ", group);
  check_int4_side(n, k_data, k_params, k_tail, k_sinks, groups, group, sinks, false);
  check_int4_side(n, v_data, v_params, v_tail, v_sinks, groups, group, sinks, true);
  n.stored(lengths, ScalarType::Int, "int32", {}, "lengths", "(B, H_kv)");
  if (n.empty()) return;
  const Launch launch(key);
  const KvGroupedStorage storage{{{k_data.data_ptr(), k_params.data_ptr()}, {v_data.data_ptr(), v_params.data_ptr()}},
                                 {{k_tail.data_ptr(), k_sinks.data_ptr()}, {v_tail.data_ptr(), v_sinks.data_ptr()}},
                                 static_cast<int>(group),
                                 static_cast<int>(sinks),
                                 kv_int4_value_parts(static_cast<int>(n.dim()))};
  n.check.launched(launch_kv_int4_append(n.args(groups * group, lengths), storage, dtype, launch.stream()));
}

void kv_h2o_append(const std::optional<Tensor>& query, const Tensor& key, const Tensor& value,
                   const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm, double eps,
                   const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, bool rotate,
                   const std::optional<Tensor>& query_out, const Tensor& k_data, const Tensor& k_scale,
                   const Tensor& v_data, const Tensor& v_scale, const Tensor& scores, const Tensor& positions,
                   const Tensor& counts, int64_t window, int64_t sinks) {
  const NewTokens n{{"kv_h2o_append"}, query, key, value, q_norm, k_norm, eps, cos, sin, rotate, query_out};
  const Dtype dtype = n.checked();
  n.check(n.tokens() == 1, "takes one token a row, got ", n.tokens());
  const int64_t budget = entries(n.check, k_data, "k_data");
  for (const auto& [data, scale] : {std::tie(k_data, k_scale), std::tie(v_data, v_scale)}) {
    n.stored(data, ScalarType::Float8_e4m3fn, "float8_e4m3fn", {budget, n.dim()}, "k_data and v_data",
             "(B, H_kv, slots, D)");
    n.stored(scale, ScalarType::Half, "float16", {budget}, "k_scale and v_scale", "(B, H_kv, slots)");
  }
  n.check(budget % 4 == 0, "takes a number of slots that is a multiple of 4, got ", budget);
  n.stored(scores, ScalarType::Float, "float32", {budget}, "scores", "(B, H_kv, slots)");
  n.stored(positions, ScalarType::Int, "int32", {budget}, "positions", "(B, H_kv, slots)");
  n.stored(counts, ScalarType::Int, "int32", {2}, "counts", "(B, H_kv, 2)");
  n.check(window >= 0 && sinks >= 0 && window - 1 + sinks < budget, "window ", window, " and sinks ", sinks,
          " leave none of ", budget, " slots to evict from");
  if (n.empty()) return;
  const Launch launch(key);
  const KvH2OStorage storage{{k_data.data_ptr(), k_scale.data_ptr()},
                             {v_data.data_ptr(), v_scale.data_ptr()},
                             static_cast<float*>(scores.data_ptr()),
                             static_cast<int32_t*>(positions.data_ptr()),
                             static_cast<int>(window),
                             static_cast<int>(sinks)};
  n.check.launched(launch_kv_h2o_append(n.args(budget, counts), storage, dtype, launch.stream()));
}

void kv_int8_dequantize(const Tensor& cache, const Tensor& scale, int64_t start, const Tensor& out) {
  constexpr Check check{"kv_int8_dequantize"};
  check.shape(cache, {-1, -1, -1, -1}, "data", "(B, H_kv, capacity, D)");
  const int64_t batch = cache.size(0), heads = cache.size(1), capacity = cache.size(2), dim = cache.size(3);
  check_cache(check, cache, scale, batch, heads, capacity, dim, "data", "scale");
  const Dtype dtype = check.float_dtype(out, "out");
  check.shape(out, {batch, heads, -1, dim}, "out", "(B, H_kv, length, D)");
  check.contiguous(out, "out");
  const int64_t length = out.size(2);
  check(start >= 0 && start + length <= capacity, "tokens ", start, " to ", start + length,
        " are not within the capacity ", capacity);
  check(length * dim <= kMaxInt * 64, "length ", length, " is too long");
  check.same_device(cache, scale, "scale");
  check.same_device(cache, out, "out");
  if (out.numel() == 0) return;
  const Launch launch(cache);
  const KvDequantizeArgs args{data<int8_t>(cache) + start * dim,
                              static_cast<const uint16_t*>(data(scale)) + start,
                              out.data_ptr(),
                              batch * heads,
                              capacity,
                              length,
                              static_cast<int>(dim)};
  check.launched(launch_kv_int8_dequantize(args, dtype, launch.stream()));
}

// What fp8 and int4 have in common; `tail` gives B, H_kv and D.
KvExpandArgs expand_args(const Check& check, const Tensor& cache, const Tensor& scale, const Tensor& tail,
                         const Tensor* sinks, const Tensor& lengths, int64_t start, const Tensor& out, int64_t capacity,
                         bool values) {
  const int64_t batch = tail.size(0), heads = tail.size(1), group = tail.size(2), dim = tail.size(3);
  check.dtype(lengths, ScalarType::Int, "lengths", "int32");
  check.shape(lengths, {batch, heads}, "lengths", "(B, H_kv)");
  check.shape(out, {batch, heads, -1, dim}, "out", "(B, H_kv, length, D)");
  check(tail.scalar_type() == out.scalar_type(), "out must have the dtype of the tail");
  const int64_t front = sinks ? sinks->size(2) : 0;
  check(start >= 0 && start + out.size(2) <= capacity + front, "tokens ", start, " to ", start + out.size(2),
        " are not within the capacity ", capacity + front);
  const std::pair<const Tensor*, const char*> all[] = {{&cache, "data"}, {&scale, "scale or params"},
                                                       {&tail, "tail"},  {&lengths, "lengths"},
                                                       {&out, "out"},    {sinks, "sinks"}};
  for (const auto& [t, name] : all) {
    if (t == nullptr) continue;
    check.contiguous(*t, name);
    check.aligned(*t, 16, name);
    check.same_device(cache, *t, name);
  }
  return {{cache.data_ptr(), scale.data_ptr()},
          {tail.data_ptr(), sinks ? sinks->data_ptr() : nullptr},
          data<int32_t>(lengths),
          out.data_ptr(),
          batch * heads,
          capacity,
          start,
          out.size(2),
          static_cast<int>(dim),
          static_cast<int>(group),
          static_cast<int>(front),
          values,
          kv_int4_value_parts(static_cast<int>(dim))};
}

void kv_fp8_dequantize(const Tensor& cache, const Tensor& scale, const Tensor& tail, const Tensor& lengths,
                       int64_t start, const Tensor& out) {
  constexpr Check check{"kv_fp8_dequantize"};
  const Dtype dtype = check.float_dtype(out, "out");
  check.shape(tail, {-1, -1, kFp8Group, -1}, "tail", "(B, H_kv, 64, D)");
  const int64_t batch = tail.size(0), heads = tail.size(1), dim = tail.size(3);
  check(dim % 8 == 0 && dim >= 8, "takes head dimensions that are multiples of 8, got ", dim);
  check.dtype(cache, ScalarType::Float8_e4m3fn, "data", "float8_e4m3fn");
  check.shape(cache, {batch, heads, -1, dim}, "data", "(B, H_kv, capacity, D)");
  const int64_t capacity = cache.size(2);
  check.dtype(scale, ScalarType::Float, "scale", "float32");
  check.shape(scale, {batch, heads, capacity / kFp8Group}, "scale", "(B, H_kv, capacity / 64)");
  const KvExpandArgs args = expand_args(check, cache, scale, tail, nullptr, lengths, start, out, capacity, false);
  if (out.numel() == 0) return;
  const Launch launch(cache);
  check.launched(launch_kv_fp8_dequantize(args, dtype, launch.stream()));
}

void kv_int4_dequantize(const Tensor& cache, const Tensor& params, const Tensor& tail, const Tensor& sinks,
                        const Tensor& lengths, bool values, int64_t start, const Tensor& out) {
  constexpr Check check{"kv_int4_dequantize"};
  const Dtype dtype = check.float_dtype(out, "out");
  check.shape(tail, {-1, -1, -1, -1}, "tail", "(B, H_kv, group, D)");
  const int64_t batch = tail.size(0), heads = tail.size(1), group = tail.size(2), dim = tail.size(3);
  check(group == 32 || group == 64, "groups must have 32 or 64 tokens, got ", group);
  check_int4_dim(check, dim);
  check.shape(sinks, {batch, heads, -1, dim}, "sinks", "(B, H_kv, sinks, D)");
  check(sinks.scalar_type() == tail.scalar_type(), "sinks and tail must have the same dtype");
  check.dtype(cache, ScalarType::Byte, "data", "uint8");
  check.dtype(params, ScalarType::Half, "params", "float16");
  const int64_t groups = entries(check, params, "params"), parts = kv_int4_value_parts(static_cast<int>(dim));
  if (values) {
    check.shape(cache, {batch, heads, groups * group / 8, dim, 4}, "data", "(B, H_kv, capacity / 8, D, 4)");
    check.shape(params, {batch, heads, groups, 2, parts, group}, "params",
                "(B, H_kv, capacity / group, 2, parts, group)");
  } else {
    check.shape(cache, {batch, heads, groups * group, dim / 2}, "data", "(B, H_kv, capacity, D / 2)");
    check.shape(params, {batch, heads, groups, 2, dim}, "params", "(B, H_kv, capacity / group, 2, D)");
  }
  const KvExpandArgs args =
      expand_args(check, cache, params, tail, &sinks, lengths, start, out, groups * group, values);
  if (out.numel() == 0) return;
  const Launch launch(cache);
  check.launched(launch_kv_int4_dequantize(args, dtype, launch.stream()));
}

}  // namespace
}  // namespace hf_fastpath

STABLE_TORCH_LIBRARY_IMPL(hf_fastpath, CUDA, m) {
  m.impl("kv_static_append", TORCH_BOX(&hf_fastpath::kv_static_append));
  m.impl("kv_int8_append", TORCH_BOX(&hf_fastpath::kv_int8_append));
  m.impl("kv_fp8_append", TORCH_BOX(&hf_fastpath::kv_fp8_append));
  m.impl("kv_int4_append", TORCH_BOX(&hf_fastpath::kv_int4_append));
  m.impl("kv_h2o_append", TORCH_BOX(&hf_fastpath::kv_h2o_append));
  m.impl("kv_int8_dequantize", TORCH_BOX(&hf_fastpath::kv_int8_dequantize));
  m.impl("kv_fp8_dequantize", TORCH_BOX(&hf_fastpath::kv_fp8_dequantize));
  m.impl("kv_int4_dequantize", TORCH_BOX(&hf_fastpath::kv_int4_dequantize));
}
