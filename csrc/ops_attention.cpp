// Attention on CUDA: argument checks, dispatch on the dtype, launch (see ops_checks.h).
#include <torch/csrc/stable/library.h>

#include "ops_cache_checks.h"

namespace hf_fastpath {
namespace {

void check_mask(const Check& check, const Tensor& query, const Tensor& mask, int64_t length) {
  check.dtype(mask, ScalarType::Bool, "mask", "bool");
  check.shape(mask, {query.size(0), -1}, "mask", "(B, >= length)");
  check(mask.size(1) >= length, "mask must have at least length ", length, " columns, got ", mask.size(1));
  check(mask.stride(1) == 1 || mask.size(1) == 1, "mask must be contiguous in its last dimension");
  check.same_device(query, mask, "mask");
}

Tensor attn_decode_int8(const Tensor& query, const Tensor& k_data, const Tensor& k_scale, const Tensor& v_data,
                        const Tensor& v_scale, const std::optional<Tensor>& mask, int64_t length, double scaling) {
  constexpr Check check{"attn_decode_int8"};
  const Dtype dtype = check.float_dtype(query, "query");
  check.shape(query, {-1, -1, -1}, "query", "(B, H, D)");
  check.contiguous(query, "query");
  const int64_t batch = query.size(0), heads = query.size(1), dim = query.size(2);
  check(dim >= 16 && dim <= kMaxKvDim && dim % 16 == 0, "takes head dimensions that are multiples of 16 up to ",
        kMaxKvDim, ", got ", dim);
  check.shape(k_data, {batch, -1, -1, dim}, "k_data", "(B, H_kv, capacity, D) with query's B and D");
  const int64_t kv_heads = k_data.size(1), capacity = k_data.size(2);
  check(kv_heads >= 1 && heads % kv_heads == 0, "the number of heads ", heads, " is not a multiple of H_kv ", kv_heads);
  check_cache(check, k_data, k_scale, batch, kv_heads, capacity, dim, "k_data", "k_scale");
  check_cache(check, v_data, v_scale, batch, kv_heads, capacity, dim, "v_data", "v_scale");
  check.aligned(k_data, 16, "k_data");
  check.aligned(v_data, 16, "v_data");
  check(length >= 1 && length <= capacity, "length must be in 1 to the capacity ", capacity, ", got ", length);
  check(batch <= 65535 && heads <= 65535, "takes up to 65535 rows and heads");
  check.same_device(query, k_data, "k_data");
  check.same_device(query, k_scale, "k_scale");
  check.same_device(query, v_data, "v_data");
  check.same_device(query, v_scale, "v_scale");
  if (mask) check_mask(check, query, *mask, length);
  const Launch launch(query);
  Tensor out = launch.empty({batch, heads, dim}, query.scalar_type());
  if (query.numel() == 0) return out;
  const Tensor scratch = launch.empty({attn_decode_scratch_floats(batch, heads, dim, length)}, ScalarType::Float);
  const AttnDecodeArgs args{data(query),
                            data<int8_t>(k_data),
                            data(k_scale),
                            data<int8_t>(v_data),
                            data(v_scale),
                            data<uint8_t>(mask),
                            mask ? mask->stride(0) : 0,
                            out.data_ptr(),
                            static_cast<float*>(scratch.data_ptr()),
                            static_cast<int>(batch),
                            static_cast<int>(heads),
                            static_cast<int>(kv_heads),
                            static_cast<int>(dim),
                            capacity,
                            length,
                            static_cast<float>(scaling)};
  check.launched(launch_attn_decode_int8(args, dtype, launch.stream()));
  return out;
}

Tensor attn_received(const Tensor& query, const Tensor& key, const Tensor& lse, const Tensor& positions,
                     const std::optional<Tensor>& mask, int64_t start, double scaling) {
  constexpr Check check{"attn_received"};
  const Dtype dtype = check.float_dtype(query, "query");
  check.shape(query, {-1, -1, -1, -1}, "query", "(B, H, q, D)");
  const int64_t batch = query.size(0), heads = query.size(1), tokens = query.size(2), dim = query.size(3);
  check(dim % 8 == 0 && dim >= 8 && dim <= kMaxKvDim, "takes head dimensions that are multiples of 8 up to ", kMaxKvDim,
        ", got ", dim);
  check(key.scalar_type() == query.scalar_type(), "query and key must have the same dtype");
  check.shape(key, {batch, -1, -1, dim}, "key", "(B, H_kv, n, D) with query's B and D");
  const int64_t kv_heads = key.size(1), keys = key.size(2);
  check(kv_heads >= 1 && heads % kv_heads == 0, "the number of heads ", heads, " is not a multiple of H_kv ", kv_heads);
  check(keys >= tokens && keys <= kMaxInt / 2, "key must have at least the queries' ", tokens, " tokens, got ", keys);
  check.dtype(lse, ScalarType::Float, "lse", "float32");
  check.shape(lse, {batch, heads, tokens}, "lse", "(B, H, q)");
  check.dtype(positions, ScalarType::Int, "positions", "int32");
  check.shape(positions, {batch, kv_heads, -1}, "positions", "(B, H_kv, >= n - q)");
  check(positions.size(2) >= keys - tokens, "positions must have at least ", keys - tokens, " columns, got ",
        positions.size(2));
  check(start >= keys - tokens, "start ", start, " is less than the ", keys - tokens, " older keys");
  if (mask) {
    check.dtype(*mask, ScalarType::Bool, "mask", "bool");
    check.shape(*mask, {batch, tokens, -1}, "mask", "(B, q, >= start + q)");
    check(mask->size(2) >= start + tokens, "mask must have at least ", start + tokens, " columns, got ", mask->size(2));
    check(mask->stride(2) == 1 || mask->size(2) == 1, "mask must be contiguous in its last dimension");
    check.same_device(query, *mask, "mask");
  }
  const std::pair<const Tensor*, const char*> all[] = {
      {&query, "query"}, {&key, "key"}, {&lse, "lse"}, {&positions, "positions"}};
  for (const auto& [t, name] : all) {
    check.contiguous(*t, name);
    check.same_device(query, *t, name);
  }
  check.aligned(query, 16, "query");
  check.aligned(key, 16, "key");
  check(batch <= 65535 && kv_heads <= 65535, "takes up to 65535 rows and heads");
  const Launch launch(query);
  Tensor out = launch.empty({batch, kv_heads, keys}, ScalarType::Float);
  if (out.numel() == 0) return out;
  const AttnReceivedArgs args{data(query),
                              data(key),
                              data<float>(lse),
                              tokens,
                              data<int32_t>(positions),
                              positions.size(2),
                              data<uint8_t>(mask),
                              mask ? mask->stride(0) : 0,
                              mask ? mask->stride(1) : 0,
                              start,
                              static_cast<float*>(out.data_ptr()),
                              static_cast<int>(batch),
                              static_cast<int>(heads),
                              static_cast<int>(kv_heads),
                              static_cast<int>(tokens),
                              static_cast<int>(keys),
                              static_cast<int>(keys - tokens),
                              static_cast<int>(dim),
                              static_cast<float>(scaling)};
  check.launched(launch_attn_received(args, dtype, launch.stream()));
  return out;
}

}  // namespace
}  // namespace hf_fastpath

STABLE_TORCH_LIBRARY_IMPL(hf_fastpath, CUDA, m) {
  m.impl("attn_received", TORCH_BOX(&hf_fastpath::attn_received));
  m.impl("attn_decode_int8", TORCH_BOX(&hf_fastpath::attn_decode_int8));
}
