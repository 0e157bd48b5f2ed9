// Checks of new tokens and of the caches' storage, which the ops of the caches and those of attention share.
#pragma once

#include "ops_checks.h"

namespace hf_fastpath {

// The two tensors of one side of an int8 cache of `like`'s batch, heads and dimension.
inline void check_cache(const Check& check, const Tensor& cache, const Tensor& scale, int64_t batch, int64_t heads,
                        int64_t capacity, int64_t dim, const char* cache_name, const char* scale_name) {
  check.dtype(cache, ScalarType::Char, cache_name, "int8");
  check.shape(cache, {batch, heads, capacity, dim}, cache_name, "(B, H_kv, capacity, D)");
  check.contiguous(cache, cache_name);
  check.dtype(scale, ScalarType::Half, scale_name, "float16");
  check.shape(scale, {batch, heads, capacity}, scale_name, "(B, H_kv, capacity)");
  check.contiguous(scale, scale_name);
}

// The arguments that every appending op begins with: ARGUMENTS in hf_fastpath/ops/_append.py. Of an op that attends
// besides, query_out is nothing.
struct NewTokens {
  Check check;
  const std::optional<Tensor>& query;
  const Tensor& key;
  const Tensor& value;
  const std::optional<Tensor>& q_norm;
  const std::optional<Tensor>& k_norm;
  double eps;
  const std::optional<Tensor>& cos;
  const std::optional<Tensor>& sin;
  bool rotate;
  const std::optional<Tensor>& query_out;

  int64_t batch() const { return key.size(0); }
  int64_t kv_heads() const { return key.size(1); }
  int64_t tokens() const { return key.size(2); }
  int64_t dim() const { return key.size(3); }
  bool empty() const { return key.numel() == 0; }

  // A tensor of the storage, `sizes` behind (B, H_kv).
  void stored(const Tensor& t, ScalarType type, const char* type_name, std::initializer_list<int64_t> sizes,
              const char* name, const char* meaning) const {
    check.dtype(t, type, name, type_name);
    bool fits = t.dim() == static_cast<int64_t>(sizes.size()) + 2 && t.size(0) == batch() && t.size(1) == kv_heads();
    for (size_t i = 0; fits && i < sizes.size(); ++i) {
      fits = t.size(static_cast<int64_t>(i) + 2) == sizes.begin()[i];
    }
    check(fits, name, " must have shape ", meaning, " with key's B, H_kv and D, got ", t);
    check.contiguous(t, name);
    check.aligned(t, 16, name);
    check.same_device(key, t, name);
  }
  void stored_floats(const Tensor& t, std::initializer_list<int64_t> sizes, const char* name,
                     const char* meaning) const {
    stored(t, key.scalar_type(), "of key's dtype", sizes, name, meaning);
  }

  // Of an op that appends.
  Dtype checked() const {
    check(query.has_value() == query_out.has_value(), "query and query_out come together");
    const Dtype dtype = checked_inputs();
    if (query) check_query_out();
    return dtype;
  }
  Dtype checked_inputs() const {
    const Dtype dtype = check.float_dtype(key, "key");
    check.shape(key, {-1, -1, -1, -1}, "key", "(B, H_kv, q, D)");
    check(dim() % 8 == 0 && dim() >= 8 && dim() <= kMaxKvDim, "takes head dimensions that are multiples of 8 up to ",
          kMaxKvDim, ", got ", dim());
    check.shape(value, {batch(), kv_heads(), tokens(), dim()}, "value", "of key");
    check(value.scalar_type() == key.scalar_type(), "key and value must have the same dtype");
    check(key.stride(3) == 1 && value.stride(3) == 1, "key and value must be contiguous in their last dimension");
    check.same_device(key, value, "value");
    check(batch() <= 65535 && 2 * kv_heads() <= 65535, "takes up to 65535 rows, and half as many heads");
    check(tokens() <= kMaxInt / 2, "takes up to 2^30 tokens at once");
    check_query();
    check_transform();
    return dtype;
  }

  void check_query() const {
    if (!query) return;
    check.shape(*query, {batch(), -1, tokens(), dim()}, "query", "(B, H, q, D) with key's B, q and D");
    const int64_t heads = query->size(1);
    check(heads >= 1 && heads % kv_heads() == 0 && heads <= 65535, "the number of query heads ", heads,
          " is not a multiple of H_kv ", kv_heads(), " up to 65535");
    check(query->scalar_type() == key.scalar_type(), "query and key must have the same dtype");
    check(query->stride(3) == 1, "query must be contiguous in its last dimension");
    check.same_device(key, *query, "query");
    check(q_norm.has_value() == k_norm.has_value(), "q_norm and k_norm come together");
  }
  void check_query_out() const {
    check(query_out->scalar_type() == key.scalar_type(), "query_out and key must have the same dtype");
    check.shape(*query_out, {batch(), query->size(1), tokens(), dim()}, "query_out", "of query");
    check(query_out->is_contiguous() || query_by_token(), "query_out must be contiguous, or as (B, q, H, D) in memory");
    check.aligned(*query_out, 16, "query_out");
    check.same_device(key, *query_out, "query_out");
  }

  bool query_by_token() const {
    return query_out && query_out->stride(3) == 1 && query_out->stride(1) == dim() &&
           query_out->stride(2) == query_out->size(1) * dim() &&
           query_out->stride(0) == tokens() * query_out->stride(2);
  }

  void check_transform() const {
    for (const std::optional<Tensor>* norm : {&q_norm, &k_norm}) {
      if (!*norm) continue;
      check.shape(**norm, {dim()}, "q_norm and k_norm", "(D,)");
      check((*norm)->scalar_type() == key.scalar_type(), "q_norm and k_norm must have key's dtype");
      check.contiguous(**norm, "q_norm and k_norm");
      check.same_device(key, **norm, "q_norm and k_norm");
    }
    check(cos.has_value() == sin.has_value(), "cos and sin come together");
    if (!cos) return;
    const int64_t rotary = cos->dim() == 3 ? cos->size(2) : 0;
    check(rotary >= 16 && rotary % 16 == 0 && rotary <= dim(),
          "cos must have shape (B or 1, q, D_rot), D_rot being a multiple of 16 up to D, got ", *cos);
    for (const std::optional<Tensor>* angles : {&cos, &sin}) {
      check((*angles)->dim() == 3 && ((*angles)->size(0) == batch() || (*angles)->size(0) == 1) &&
                (*angles)->size(1) == tokens() && (*angles)->size(2) == rotary,
            "cos and sin must have shape (B or 1, q, D_rot) with key's B and q, got ", **angles);
      check((*angles)->scalar_type() == key.scalar_type(), "cos and sin must have key's dtype");
      check((*angles)->stride(2) == 1, "cos and sin must be contiguous in their last dimension");
      check.same_device(key, **angles, "cos and sin");
    }
  }

  static KvRows rows(const Tensor& t) { return {data(t), t.stride(0), t.stride(1), t.stride(2)}; }
  static KvAngles angles(const std::optional<Tensor>& t) {
    if (!t) return {};
    return {data(*t), t->size(0) == 1 ? 0 : t->stride(0), t->stride(1)};
  }

  KvNewTokens args(int64_t capacity, const std::optional<Tensor>& lengths) const {
    const int size = static_cast<int>(dim());
    return {query ? rows(*query) : KvRows{},
            rows(key),
            rows(value),
            query_out ? query_out->data_ptr() : nullptr,
            data(q_norm),
            data(k_norm),
            static_cast<float>(eps),
            angles(cos),
            angles(sin),
            cos ? static_cast<int>(cos->size(2)) : 0,
            rotate ? rotation_factor(size) : 0.0f,
            static_cast<int>(batch()),
            static_cast<int>(query ? query->size(1) : kv_heads()),
            static_cast<int>(kv_heads()),
            static_cast<int>(tokens()),
            size,
            capacity,
            lengths ? static_cast<int32_t*>(lengths->data_ptr()) : nullptr,
            query_by_token()};
  }
};

}  // namespace hf_fastpath
