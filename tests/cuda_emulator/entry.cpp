// The kernels' launchers with C linkage, for ctypes: the fields of each Args struct in their order, then the dtype
// (1: bfloat16, 0: float16). They return the cudaError_t.
#include "kernels.h"

using namespace hf_fastpath;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {
Dtype dtype_of(int bfloat16) {
  return bfloat16 ? Dtype::kBFloat16 : Dtype::kFloat16;
}
}  // namespace

// The three products of an int4 weight: 0 plain, 1 fused, 2 swiglu.
EXPORT int emulated_w4a16_linear(const void* x, int64_t x_row_stride, const void* qweight, const void* scales,
                                 const uint8_t* zeros, const void* bias, void* y, int m, int n, int k, int group_size,
                                 const void* norm_weight, float eps, const void* residual, int bfloat16, int sm_count,
                                 int product) {
  const W4A16LinearArgs args{x, x_row_stride, qweight,     scales, zeros,   bias, y, m, n,
                             k, group_size,   norm_weight, eps,    residual};
  const auto launch = product == 0   ? launch_w4a16_linear
                      : product == 1 ? launch_w4a16_linear_fused
                                     : launch_w4a16_swiglu;
  return launch(args, dtype_of(bfloat16), sm_count, nullptr);
}

EXPORT int emulated_w8a16_linear(const void* x, int64_t x_row_stride, const void* qweight, const void* scales,
                                 const void* bias, void* y, int m, int n, int k, int bfloat16, int sm_count) {
  const W8A16LinearArgs args{x, x_row_stride, qweight, scales, bias, y, m, n, k};
  return launch_w8a16_linear(args, dtype_of(bfloat16), sm_count, nullptr);
}

EXPORT int emulated_w8a16_dequantize(const void* qweight, const void* scales, void* out, int n, int k, int bfloat16) {
  return launch_w8a16_dequantize({qweight, scales, out, n, k}, dtype_of(bfloat16), nullptr);
}

EXPORT int64_t emulated_w4a16_gemm_workspace_floats(int m, int n, int k, int variant, int sm_count) {
  return w4a16_gemm_workspace_floats(m, n, k, variant, sm_count);
}

EXPORT int emulated_w4a16_gemm(const void* x, int64_t x_row_stride, const void* qweight, const void* scales,
                               const uint8_t* zeros, const void* bias, void* y, float* workspace, int m, int n, int k,
                               int group_size, int variant, int bfloat16, int sm_count) {
  const W4A16GemmArgs args{x, x_row_stride, qweight, scales, zeros, bias, y, workspace, m, n, k, group_size, variant};
  return launch_w4a16_gemm(args, dtype_of(bfloat16), sm_count, nullptr);
}

EXPORT int emulated_w4a16_dequantize(const void* qweight, const void* scales, const uint8_t* zeros, void* out, int n,
                                     int k, int group_size, int bfloat16) {
  return launch_w4a16_dequantize({qweight, scales, zeros, out, n, k, group_size}, dtype_of(bfloat16), nullptr);
}

// One side of an append: input, its three strides, data, scale.
EXPORT int emulated_kv_int8_append(const void* key, int64_t key_batch, int64_t key_head, int64_t key_token,
                                   int8_t* k_data, void* k_scale, const void* value, int64_t value_batch,
                                   int64_t value_head, int64_t value_token, int8_t* v_data, void* v_scale, int batch,
                                   int heads, int tokens, int dim, int64_t capacity, int64_t start, int bfloat16) {
  const KvAppendArgs args{{{key, key_batch, key_head, key_token, k_data, k_scale},
                           {value, value_batch, value_head, value_token, v_data, v_scale}},
                          batch,
                          heads,
                          tokens,
                          dim,
                          capacity,
                          start};
  return launch_kv_int8_append(args, dtype_of(bfloat16), nullptr);
}

EXPORT int emulated_kv_int8_dequantize(const int8_t* data, const void* scale, void* out, int64_t pairs,
                                       int64_t capacity, int64_t length, int dim, int bfloat16) {
  return launch_kv_int8_dequantize({data, scale, out, pairs, capacity, length, dim}, dtype_of(bfloat16), nullptr);
}

// The formats' launchers: 0 static, 1 int8, 2 fp8, 3 int4, 4 h2o. A side: data, scale, tail, front.
EXPORT int emulated_attn_decode(int format, const void* query, const void* k_data, const void* k_scale,
                                const void* k_tail, const void* k_front, const void* v_data, const void* v_scale,
                                const void* v_tail, const void* v_front, const int* lengths, int length_stride,
                                const uint8_t* mask, int64_t mask_row_stride, int64_t mask_columns, const float* sinks,
                                void* out, float* scratch, int batch, int heads, int kv_heads, int dim, int capacity,
                                int group_tokens, int front_tokens, int window, float scaling, float softcap,
                                int clusters, const int* positions, float* slot_scores, float2* totals, int bfloat16,
                                int64_t* scratch_floats) {
  const AttnDecodeArgs args{query,
                            {k_data, k_scale, k_tail, k_front},
                            {v_data, v_scale, v_tail, v_front},
                            lengths,
                            length_stride,
                            mask,
                            mask_row_stride,
                            mask_columns,
                            sinks,
                            out,
                            scratch,
                            batch,
                            heads,
                            kv_heads,
                            dim,
                            capacity,
                            group_tokens,
                            front_tokens,
                            window,
                            scaling,
                            softcap,
                            clusters != 0,
                            positions,
                            slot_scores,
                            totals};
  constexpr decltype(&launch_attn_decode_int8) kLaunch[] = {launch_attn_decode_static, launch_attn_decode_int8,
                                                            launch_attn_decode_fp8, launch_attn_decode_int4,
                                                            launch_attn_decode_h2o};
  constexpr decltype(&attn_decode_int8_scratch_floats) kFloats[] = {
      attn_decode_static_scratch_floats, attn_decode_int8_scratch_floats, attn_decode_fp8_scratch_floats,
      attn_decode_int4_scratch_floats, attn_decode_h2o_scratch_floats};
  if (!scratch_floats) return kLaunch[format](args, dtype_of(bfloat16), nullptr);
  *scratch_floats = kFloats[format](args);
  return 0;
}

EXPORT int emulated_h2o_count(const float* slot_scores, const float2* totals, const uint8_t* mask,
                              int64_t mask_row_stride, int64_t mask_columns, float* scores, int* counts, int batch,
                              int heads, int kv_heads, int capacity) {
  return launch_h2o_count({slot_scores, totals, mask, mask_row_stride, mask_columns, scores, counts, batch, heads,
                           kv_heads, capacity},
                          nullptr);
}
