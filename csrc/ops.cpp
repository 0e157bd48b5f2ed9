// The hf_fastpath operators on CUDA: argument checks, dispatch on the dtype, launch. This file and ops_checks.h are
// the only ones that know torch, and only its stable ABI, so that one library serves every torch from 2.11 on. Schemas
// are defined in hf_fastpath/ops/*.py; tests/test_op_schemas.py compares them with the signatures here, since the ABI
// does not check types.
#include <torch/csrc/stable/library.h>

#include "ops_checks.h"

namespace hf_fastpath {
namespace {

// The packed weight's tensors, as described in hf_fastpath/packing.py. Returns the scales' dtype.
Dtype check_packed(const Check& check, const Tensor& qweight, const Tensor& scales, const std::optional<Tensor>& zeros,
                   int64_t k, int64_t n, int64_t group_size) {
  check(group_size == 32 || group_size == 64 || group_size == 128, "group_size must be 32, 64 or 128, got ",
        group_size);
  check(n >= 1 && n <= kMaxInt - 16, "out_features must be positive, got ", n);
  check(k >= group_size && k <= kMaxInt - 128 && k % group_size == 0,
        "in_features must be a positive multiple of group_size ", group_size, ", got ", k);
  const int64_t row_tiles = (n + 15) / 16;
  check.dtype(qweight, ScalarType::Int, "qweight", "int32");
  check.shape(qweight, {row_tiles, (k + 63) / 64, 32, 4}, "qweight", "(ceil(N/16), ceil(K/64), 32, 4)");
  check.contiguous(qweight, "qweight");
  check.aligned(qweight, 16, "qweight");
  const Dtype dtype = check.float_dtype(scales, "scales");
  check.shape(scales, {row_tiles, k / group_size, 16}, "scales", "(ceil(N/16), K/group, 16)");
  check.contiguous(scales, "scales");
  check.aligned(scales, 4, "scales");
  check.same_device(qweight, scales, "scales");
  if (zeros) {
    check.dtype(*zeros, ScalarType::Byte, "zeros", "uint8");
    check.shape(*zeros, {row_tiles, k / group_size, 16}, "zeros", "(ceil(N/16), K/group, 16)");
    check.contiguous(*zeros, "zeros");
    check.aligned(*zeros, 4, "zeros");
    check.same_device(qweight, *zeros, "zeros");
  }
  return dtype;
}

// The two tensors of one side of an int8 cache of `like`'s batch, heads and dimension.
void check_cache(const Check& check, const Tensor& cache, const Tensor& scale, int64_t batch, int64_t heads,
                 int64_t capacity, int64_t dim, const char* cache_name, const char* scale_name) {
  check.dtype(cache, ScalarType::Char, cache_name, "int8");
  check.shape(cache, {batch, heads, capacity, dim}, cache_name, "(B, H_kv, capacity, D)");
  check.contiguous(cache, cache_name);
  check.dtype(scale, ScalarType::Half, scale_name, "float16");
  check.shape(scale, {batch, heads, capacity}, scale_name, "(B, H_kv, capacity)");
  check.contiguous(scale, scale_name);
}

// x, a matrix, and bias of a product whose packed weight was checked before.
void check_product(const Check& check, const Tensor& x, const Tensor& qweight, const Tensor& scales,
                   const std::optional<Tensor>& bias, int64_t out_features) {
  check(x.stride(1) == 1, "x must be contiguous in its last dimension");
  check(x.scalar_type() == scales.scalar_type(), "x and scales must have the same dtype");
  check.same_device(x, qweight, "qweight");
  if (bias) {
    check(bias->scalar_type() == x.scalar_type(), "bias and x must have the same dtype");
    check.shape(*bias, {out_features}, "bias", "(N,)");
    check.contiguous(*bias, "bias");
    check.same_device(x, *bias, "bias");
  }
}

// The same for the kernels that take a few rows only.
void check_rows(const Check& check, const Tensor& x, const Tensor& qweight, const Tensor& scales,
                const std::optional<Tensor>& bias, int64_t out_features, const char* many_rows) {
  check(x.size(0) <= kMaxLinearRows, "takes up to ", kMaxLinearRows, " rows, got ", x.size(0), "; use ", many_rows,
        " for more");
  check_product(check, x, qweight, scales, bias, out_features);
}

// What only the fused products ask for: aligned rows, and the norm's weight.
void check_fused(const Check& check, const Tensor& x, const std::optional<Tensor>& norm_weight, double eps) {
  check.aligned(x, 16, "x");
  check(x.size(0) <= 1 || x.stride(0) % 8 == 0, "the row stride of x must be a multiple of 8, got ", x.stride(0));
  if (!norm_weight) return;
  check(norm_weight->scalar_type() == x.scalar_type(), "norm_weight and x must have the same dtype");
  check.shape(*norm_weight, {x.size(1)}, "norm_weight", "(K,)");
  check.contiguous(*norm_weight, "norm_weight");
  check.aligned(*norm_weight, 16, "norm_weight");
  check.same_device(x, *norm_weight, "norm_weight");
  check(eps >= 0, "eps must not be negative, got ", eps);
}

W4A16LinearArgs int4_args(const Tensor& x, const Tensor& qweight, const Tensor& scales,
                          const std::optional<Tensor>& zeros, const std::optional<Tensor>& bias, const Tensor& y,
                          int64_t out_features, int64_t group_size) {
  W4A16LinearArgs args = {};
  args.x = data(x);
  args.x_row_stride = x.stride(0);
  args.qweight = data(qweight);
  args.scales = data(scales);
  args.zeros = data<uint8_t>(zeros);
  args.bias = data(bias);
  args.y = y.data_ptr();
  args.m = static_cast<int>(x.size(0));
  args.n = static_cast<int>(out_features);
  args.k = static_cast<int>(x.size(1));
  args.group_size = static_cast<int>(group_size);
  return args;
}

Tensor w4a16_linear(const Tensor& x, const Tensor& qweight, const Tensor& scales, const std::optional<Tensor>& zeros,
                    const std::optional<Tensor>& bias, int64_t out_features, int64_t group_size) {
  constexpr Check check{"w4a16_linear"};
  check.shape(x, {-1, -1}, "x", "(M, K)");
  const Dtype dtype = check_packed(check, qweight, scales, zeros, x.size(1), out_features, group_size);
  check_rows(check, x, qweight, scales, bias, out_features, "w4a16_dequantize");
  const Launch launch(x);
  Tensor y = launch.empty({x.size(0), out_features}, x.scalar_type());
  if (x.size(0) == 0) return y;
  const W4A16LinearArgs args = int4_args(x, qweight, scales, zeros, bias, y, out_features, group_size);
  check.launched(launch_w4a16_linear(args, dtype, launch.sm_count(), launch.stream()));
  return y;
}

Tensor w4a16_linear_fused(const Tensor& x, const Tensor& qweight, const Tensor& scales,
                          const std::optional<Tensor>& zeros, const std::optional<Tensor>& bias,
                          const std::optional<Tensor>& norm_weight, double eps, const std::optional<Tensor>& residual,
                          int64_t out_features, int64_t group_size) {
  constexpr Check check{"w4a16_linear_fused"};
  check.shape(x, {-1, -1}, "x", "(M, K)");
  const Dtype dtype = check_packed(check, qweight, scales, zeros, x.size(1), out_features, group_size);
  check_rows(check, x, qweight, scales, bias, out_features, "separate modules");
  check_fused(check, x, norm_weight, eps);
  if (residual) {
    check(residual->scalar_type() == x.scalar_type(), "residual and x must have the same dtype");
    check.shape(*residual, {x.size(0), out_features}, "residual", "(M, N)");
    check.contiguous(*residual, "residual");
    check.same_device(x, *residual, "residual");
  }
  const Launch launch(x);
  Tensor y = launch.empty({x.size(0), out_features}, x.scalar_type());
  if (x.size(0) == 0) return y;
  W4A16LinearArgs args = int4_args(x, qweight, scales, zeros, bias, y, out_features, group_size);
  args.norm_weight = data(norm_weight);
  args.eps = static_cast<float>(eps);
  args.residual = data(residual);
  check.launched(launch_w4a16_linear_fused(args, dtype, launch.sm_count(), launch.stream()));
  return y;
}

Tensor w4a16_swiglu(const Tensor& x, const Tensor& qweight, const Tensor& scales, const std::optional<Tensor>& zeros,
                    const std::optional<Tensor>& bias, const std::optional<Tensor>& norm_weight, double eps,
                    int64_t intermediate_size, int64_t group_size) {
  constexpr Check check{"w4a16_swiglu"};
  check(intermediate_size >= 16 && intermediate_size <= kMaxInt / 2 - 16 && intermediate_size % 16 == 0,
        "intermediate_size must be a positive multiple of 16, got ", intermediate_size);
  check.shape(x, {-1, -1}, "x", "(M, K)");
  const int64_t rows = 2 * intermediate_size;
  const Dtype dtype = check_packed(check, qweight, scales, zeros, x.size(1), rows, group_size);
  check_rows(check, x, qweight, scales, bias, rows, "separate modules");
  check_fused(check, x, norm_weight, eps);
  const Launch launch(x);
  Tensor y = launch.empty({x.size(0), intermediate_size}, x.scalar_type());
  if (x.size(0) == 0) return y;
  W4A16LinearArgs args = int4_args(x, qweight, scales, zeros, bias, y, rows, group_size);
  args.norm_weight = data(norm_weight);
  args.eps = static_cast<float>(eps);
  check.launched(launch_w4a16_swiglu(args, dtype, launch.sm_count(), launch.stream()));
  return y;
}

// The packed weight's tensors, as described in hf_fastpath/packing_int8.py. Returns the scales' dtype.
Dtype check_packed_int8(const Check& check, const Tensor& qweight, const Tensor& scales, int64_t k, int64_t n) {
  check(n >= 1 && n <= kMaxInt - 16, "out_features must be positive, got ", n);
  check(k >= 32 && k <= kMaxInt - 128 && k % 32 == 0, "in_features must be a positive multiple of 32, got ", k);
  check.dtype(qweight, ScalarType::Char, "qweight", "int8");
  check.shape(qweight, {(n + 15) / 16, k / 32, 32, 16}, "qweight", "(ceil(N/16), K/32, 32, 16)");
  check.contiguous(qweight, "qweight");
  check.aligned(qweight, 16, "qweight");
  const Dtype dtype = check.float_dtype(scales, "scales");
  check.shape(scales, {n}, "scales", "(N,)");
  check.contiguous(scales, "scales");
  check.same_device(qweight, scales, "scales");
  return dtype;
}

Tensor w8a16_linear(const Tensor& x, const Tensor& qweight, const Tensor& scales, const std::optional<Tensor>& bias,
                    int64_t out_features) {
  constexpr Check check{"w8a16_linear"};
  check.shape(x, {-1, -1}, "x", "(M, K)");
  const Dtype dtype = check_packed_int8(check, qweight, scales, x.size(1), out_features);
  check_rows(check, x, qweight, scales, bias, out_features, "w8a16_dequantize");
  const Launch launch(x);
  Tensor y = launch.empty({x.size(0), out_features}, x.scalar_type());
  if (x.size(0) == 0) return y;
  const W8A16LinearArgs args{data(x),
                             x.stride(0),
                             data(qweight),
                             data(scales),
                             data(bias),
                             y.data_ptr(),
                             static_cast<int>(x.size(0)),
                             static_cast<int>(out_features),
                             static_cast<int>(x.size(1))};
  check.launched(launch_w8a16_linear(args, dtype, launch.sm_count(), launch.stream()));
  return y;
}

Tensor w8a16_dequantize(const Tensor& qweight, const Tensor& scales, int64_t out_features) {
  constexpr Check check{"w8a16_dequantize"};
  check.shape(qweight, {-1, -1, -1, -1}, "qweight", "(ceil(N/16), K/32, 32, 16)");
  const int64_t in_features = qweight.size(1) * 32;
  const Dtype dtype = check_packed_int8(check, qweight, scales, in_features, out_features);
  const Launch launch(qweight);
  Tensor out = launch.empty({out_features, in_features}, scales.scalar_type());
  const W8A16DequantizeArgs args{data(qweight), data(scales), out.data_ptr(), static_cast<int>(out_features),
                                 static_cast<int>(in_features)};
  check.launched(launch_w8a16_dequantize(args, dtype, launch.stream()));
  return out;
}

Tensor w4a16_gemm(const Tensor& x, const Tensor& qweight, const Tensor& scales, const std::optional<Tensor>& zeros,
                  const std::optional<Tensor>& bias, int64_t out_features, int64_t group_size, int64_t variant) {
  constexpr Check check{"w4a16_gemm"};
  check(variant >= 0 && variant < kW4A16GemmVariants, "variant must be in 0 to ", kW4A16GemmVariants - 1, ", got ",
        variant);
  check.shape(x, {-1, -1}, "x", "(M, K)");
  const int64_t m = x.size(0), k = x.size(1);
  const Dtype dtype = check_packed(check, qweight, scales, zeros, k, out_features, group_size);
  check.aligned(scales, 16, "scales");
  if (zeros) check.aligned(*zeros, 16, "zeros");
  check_product(check, x, qweight, scales, bias, out_features);
  // The smallest tile is 128 by 32, and its units of 128 columns are counted in 32 bits.
  check(k <= 1 << 24, "in_features must be at most ", 1 << 24, ", got ", k);
  check(m <= kMaxInt - 256 && (out_features / 128 + 1) * (m / 32 + 1) <= kMaxInt / (k / 128 + 1),
        "M * N * K is too large: ", m, " * ", out_features, " * ", k);
  const Launch launch(x);
  Tensor y = launch.empty({m, out_features}, x.scalar_type());
  if (m == 0) return y;
  const int rows = static_cast<int>(m), n = static_cast<int>(out_features), cols = static_cast<int>(k);
  const int form = static_cast<int>(variant);
  const int64_t floats = w4a16_gemm_workspace_floats(rows, n, cols, form, launch.sm_count());
  const Tensor workspace = launch.empty({floats}, ScalarType::Float);
  const W4A16GemmArgs args{data(x),
                           x.stride(0),
                           data(qweight),
                           data(scales),
                           data<uint8_t>(zeros),
                           data(bias),
                           y.data_ptr(),
                           static_cast<float*>(workspace.data_ptr()),
                           rows,
                           n,
                           cols,
                           static_cast<int>(group_size),
                           form};
  const cudaError_t error = launch_w4a16_gemm(args, dtype, launch.sm_count(), launch.stream());
  check(error != cudaErrorNoKernelImageForDevice, "variant ", form,
        " needs a GPU of compute capability 9.0, and kernels that were compiled for sm_90a");
  check.launched(error);
  return y;
}

Tensor w4a16_dequantize(const Tensor& qweight, const Tensor& scales, const std::optional<Tensor>& zeros,
                        int64_t in_features, int64_t out_features, int64_t group_size) {
  constexpr Check check{"w4a16_dequantize"};
  const Dtype dtype = check_packed(check, qweight, scales, zeros, in_features, out_features, group_size);
  const Launch launch(qweight);
  Tensor out = launch.empty({out_features, in_features}, scales.scalar_type());
  const W4A16DequantizeArgs args{data(qweight),
                                 data(scales),
                                 data<uint8_t>(zeros),
                                 out.data_ptr(),
                                 static_cast<int>(out_features),
                                 static_cast<int>(in_features),
                                 static_cast<int>(group_size)};
  check.launched(launch_w4a16_dequantize(args, dtype, launch.stream()));
  return out;
}

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

}  // namespace
}  // namespace hf_fastpath

STABLE_TORCH_LIBRARY_IMPL(hf_fastpath, CUDA, m) {
  m.impl("w4a16_linear", TORCH_BOX(&hf_fastpath::w4a16_linear));
  m.impl("w4a16_linear_fused", TORCH_BOX(&hf_fastpath::w4a16_linear_fused));
  m.impl("w4a16_swiglu", TORCH_BOX(&hf_fastpath::w4a16_swiglu));
  m.impl("w8a16_linear", TORCH_BOX(&hf_fastpath::w8a16_linear));
  m.impl("w8a16_dequantize", TORCH_BOX(&hf_fastpath::w8a16_dequantize));
  m.impl("w4a16_gemm", TORCH_BOX(&hf_fastpath::w4a16_gemm));
  m.impl("w4a16_dequantize", TORCH_BOX(&hf_fastpath::w4a16_dequantize));
  m.impl("kv_int8_append", TORCH_BOX(&hf_fastpath::kv_int8_append));
  m.impl("kv_int8_dequantize", TORCH_BOX(&hf_fastpath::kv_int8_dequantize));
  m.impl("attn_decode_int8", TORCH_BOX(&hf_fastpath::attn_decode_int8));
}
