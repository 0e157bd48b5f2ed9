// Checks of the caches' storage, which the ops of the caches and those of attention share.
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

}  // namespace hf_fastpath
