// What writes and expands the KV caches, on CUDA: argument checks, dispatch on the dtype, launch (see ops_checks.h).
#include <torch/csrc/stable/library.h>

#include "ops_cache_checks.h"

namespace hf_fastpath {
namespace {

KvAppendSide append_side(const Tensor& input, const Tensor& cache, const Tensor& scale) {
  return {data(input),     input.stride(0), input.stride(1), input.stride(2), static_cast<int8_t*>(cache.data_ptr()),
          scale.data_ptr()};
}

void kv_int8_append(const Tensor& key, const Tensor& value, const Tensor& k_data, const Tensor& k_scale,
                    const Tensor& v_data, const Tensor& v_scale, int64_t start) {
  constexpr Check check{"kv_int8_append"};
  const Dtype dtype = check.float_dtype(key, "key");
  check.shape(key, {-1, -1, -1, -1}, "key", "(B, H_kv, q, D)");
  const int64_t batch = key.size(0), heads = key.size(1), tokens = key.size(2), dim = key.size(3);
  check.shape(value, {batch, heads, tokens, dim}, "value", "of key");
  check(value.scalar_type() == key.scalar_type(), "key and value must have the same dtype");
  check(dim >= 1 && dim <= kMaxKvDim, "takes head dimensions up to ", kMaxKvDim, ", got ", dim);
  check((key.stride(3) == 1 && value.stride(3) == 1) || dim == 1,
        "key and value must be contiguous in their last dimension");
  check.shape(k_data, {-1, -1, -1, -1}, "k_data", "(B, H_kv, capacity, D)");
  const int64_t capacity = k_data.size(2);
  check_cache(check, k_data, k_scale, batch, heads, capacity, dim, "k_data", "k_scale");
  check_cache(check, v_data, v_scale, batch, heads, capacity, dim, "v_data", "v_scale");
  check(start >= 0 && start + tokens <= capacity, "tokens ", start, " to ", start + tokens,
        " do not fit a capacity of ", capacity);
  check.same_device(key, value, "value");
  check.same_device(key, k_data, "k_data");
  check.same_device(key, k_scale, "k_scale");
  check.same_device(key, v_data, "v_data");
  check.same_device(key, v_scale, "v_scale");
  if (key.numel() == 0) return;
  check(batch * heads * tokens <= kMaxInt, "takes up to 2^31 tokens and heads at once");
  const Launch launch(key);
  const KvAppendArgs args{{append_side(key, k_data, k_scale), append_side(value, v_data, v_scale)},
                          static_cast<int>(batch),
                          static_cast<int>(heads),
                          static_cast<int>(tokens),
                          static_cast<int>(dim),
                          capacity,
                          start};
  check.launched(launch_kv_int8_append(args, dtype, launch.stream()));
}

void kv_int8_dequantize(const Tensor& cache, const Tensor& scale, const Tensor& out) {
  constexpr Check check{"kv_int8_dequantize"};
  check.shape(cache, {-1, -1, -1, -1}, "data", "(B, H_kv, capacity, D)");
  const int64_t batch = cache.size(0), heads = cache.size(1), capacity = cache.size(2), dim = cache.size(3);
  check_cache(check, cache, scale, batch, heads, capacity, dim, "data", "scale");
  const Dtype dtype = check.float_dtype(out, "out");
  check.shape(out, {batch, heads, -1, dim}, "out", "(B, H_kv, length, D)");
  check.contiguous(out, "out");
  const int64_t length = out.size(2);
  check(length <= capacity, "length ", length, " is more than the capacity ", capacity);
  check(length * dim <= kMaxInt * 64, "length ", length, " is too long");
  check.same_device(cache, scale, "scale");
  check.same_device(cache, out, "out");
  if (out.numel() == 0) return;
  const Launch launch(cache);
  const KvDequantizeArgs args{data<int8_t>(cache),  data(scale), out.data_ptr(), batch * heads, capacity, length,
                              static_cast<int>(dim)};
  check.launched(launch_kv_int8_dequantize(args, dtype, launch.stream()));
}

}  // namespace
}  // namespace hf_fastpath

STABLE_TORCH_LIBRARY_IMPL(hf_fastpath, CUDA, m) {
  m.impl("kv_int8_append", TORCH_BOX(&hf_fastpath::kv_int8_append));
  m.impl("kv_int8_dequantize", TORCH_BOX(&hf_fastpath::kv_int8_dequantize));
}
