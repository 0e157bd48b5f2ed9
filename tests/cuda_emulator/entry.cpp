// The kernels' launchers with C linkage, for ctypes: the fields of each Args struct in their order, then the dtype
// (1: bfloat16, 0: float16). They return the cudaError_t.
#include "choice.h"
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
                                 const void* norm_weight, float eps, const void* residual, void* normalized,
                                 int bfloat16, int sm_count, int product) {
  const W4A16LinearArgs args{x, x_row_stride, qweight,     scales, zeros,    bias,      y, m, n,
                             k, group_size,   norm_weight, eps,    residual, normalized};
  const auto launch = product == 0   ? launch_w4a16_linear
                      : product == 1 ? launch_w4a16_linear_fused
                                     : launch_w4a16_swiglu;
  return launch(args, dtype_of(bfloat16), sm_count, nullptr);
}

// Without `residual` and `sums` RMSNorm alone.
EXPORT int emulated_rms_norm(const void* x, int64_t x_row_stride, const void* residual, const void* weight, float eps,
                             void* sums, void* y, int m, int k, int bfloat16) {
  const RmsNormArgs args{x, x_row_stride, weight, eps, y, m, k};
  return residual ? launch_add_rms_norm(args, residual, sums, dtype_of(bfloat16), nullptr)
                  : launch_rms_norm(args, dtype_of(bfloat16), nullptr);
}

EXPORT int emulated_swiglu(const void* x, void* y, int rows, int columns, int bfloat16) {
  return launch_swiglu(x, y, rows, columns, dtype_of(bfloat16), nullptr);
}

EXPORT int emulated_embedding_rows(const int64_t* ids, const void* weight, void* y, int64_t vocabulary, int rows,
                                   int row_vectors) {
  return launch_embedding_rows({ids, weight, y, vocabulary, rows, row_vectors}, nullptr);
}

EXPORT int emulated_rope_angles(const int64_t* positions, const float* inv_freq, float scaling, void* cos, void* sin,
                                int rows, int half, int bytes, int bfloat16) {
  const Dtype dtype = bytes == 4 ? Dtype::kFloat32 : dtype_of(bfloat16);
  return launch_rope_angles(positions, inv_freq, scaling, cos, sin, rows, half, dtype, nullptr);
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
                               int group_size, int variant, const void* residual, int bfloat16, int sm_count) {
  const W4A16GemmArgs args{x, x_row_stride, qweight, scales,  zeros, bias, y, workspace, m, n,
                           k, group_size,   variant, residual};
  return launch_w4a16_gemm(args, dtype_of(bfloat16), sm_count, nullptr);
}

EXPORT int emulated_w4a16_gemm_swiglu(const void* x, int64_t x_row_stride, const void* qweight, const void* scales,
                                      const uint8_t* zeros, const void* bias, void* y, int m, int n, int k,
                                      int group_size, int variant, int bfloat16, int sm_count) {
  const W4A16GemmArgs args{x, x_row_stride, qweight, scales, zeros, bias, y, nullptr, m, n,
                           k, group_size,   variant, nullptr};
  return launch_w4a16_gemm_swiglu(args, dtype_of(bfloat16), sm_count, nullptr);
}

EXPORT int emulated_w4a16_dequantize(const void* qweight, const void* scales, const uint8_t* zeros, void* out, int n,
                                     int k, int group_size, int bfloat16) {
  return launch_w4a16_dequantize({qweight, scales, zeros, out, n, k, group_size}, dtype_of(bfloat16), nullptr);
}

// The fields of KvNewTokens, `rotate` for its factor.
#define NEW_TOKENS                                                                                                     \
  const void *query, int64_t query_batch, int64_t query_head, int64_t query_token, const void *key, int64_t key_batch, \
      int64_t key_head, int64_t key_token, const void *value, int64_t value_batch, int64_t value_head,                 \
      int64_t value_token, void *query_out, const void *q_norm, const void *k_norm, float eps, const void *cos,        \
      int64_t cos_batch, int64_t cos_token, const void *sin, int64_t sin_batch, int64_t sin_token, int rotary_dim,     \
      int rotate, int batch, int heads, int kv_heads, int tokens, int dim, int64_t capacity, int32_t *lengths,         \
      int query_by_token
#define NEW_TOKENS_ARGS                                      \
  KvNewTokens{{query, query_batch, query_head, query_token}, \
              {key, key_batch, key_head, key_token},         \
              {value, value_batch, value_head, value_token}, \
              query_out,                                     \
              q_norm,                                        \
              k_norm,                                        \
              eps,                                           \
              {cos, cos_batch, cos_token},                   \
              {sin, sin_batch, sin_token},                   \
              rotary_dim,                                    \
              rotate ? rotation_factor(dim) : 0.0f,          \
              batch,                                         \
              heads,                                         \
              kv_heads,                                      \
              tokens,                                        \
              dim,                                           \
              capacity,                                      \
              lengths,                                       \
              query_by_token != 0}

EXPORT int emulated_kv_static_append(NEW_TOKENS, void* keys, void* values, int bfloat16) {
  return launch_kv_static_append(NEW_TOKENS_ARGS, {keys, values}, dtype_of(bfloat16), nullptr);
}

EXPORT int emulated_kv_int8_append(NEW_TOKENS, void* k_data, void* k_scale, void* v_data, void* v_scale, int bfloat16) {
  return launch_kv_int8_append(NEW_TOKENS_ARGS, {{k_data, k_scale}, {v_data, v_scale}}, dtype_of(bfloat16), nullptr);
}

EXPORT int emulated_kv_fp8_append(NEW_TOKENS, void* k_data, void* k_scale, void* k_tail, void* v_data, void* v_scale,
                                  void* v_tail, int bfloat16) {
  const KvGroupedStorage storage{
      {{k_data, k_scale}, {v_data, v_scale}}, {{k_tail, nullptr}, {v_tail, nullptr}}, kFp8Group, 0, 0};
  return launch_kv_fp8_append(NEW_TOKENS_ARGS, storage, dtype_of(bfloat16), nullptr);
}

EXPORT int emulated_kv_int4_append(NEW_TOKENS, void* k_data, void* k_params, void* k_tail, void* k_sinks, void* v_data,
                                   void* v_params, void* v_tail, void* v_sinks, int group, int sinks, int bfloat16) {
  const KvGroupedStorage storage{{{k_data, k_params}, {v_data, v_params}},
                                 {{k_tail, k_sinks}, {v_tail, v_sinks}},
                                 group,
                                 sinks,
                                 kv_int4_value_parts(dim)};
  return launch_kv_int4_append(NEW_TOKENS_ARGS, storage, dtype_of(bfloat16), nullptr);
}

EXPORT int emulated_kv_h2o_append(NEW_TOKENS, void* k_data, void* k_scale, void* v_data, void* v_scale, float* scores,
                                  int32_t* positions, int window, int sinks, int bfloat16) {
  const KvH2OStorage storage{{k_data, k_scale}, {v_data, v_scale}, scores, positions, window, sinks};
  return launch_kv_h2o_append(NEW_TOKENS_ARGS, storage, dtype_of(bfloat16), nullptr);
}

// `format`: 4 or 8 bits.
EXPORT int emulated_kv_dequantize(int format, void* data, void* scale, void* tail, void* sinks_rows,
                                  const int32_t* lengths, void* out, int64_t pairs, int64_t capacity, int64_t first,
                                  int64_t length, int dim, int group, int sinks, int values, int bfloat16) {
  const KvExpandArgs args{
      {data, scale}, {tail, sinks_rows},      lengths, out, pairs, capacity, first, length, dim, group, sinks,
      values != 0,   kv_int4_value_parts(dim)};
  const auto launch = format == 8 ? launch_kv_fp8_dequantize : launch_kv_int4_dequantize;
  return launch(args, dtype_of(bfloat16), nullptr);
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
                                void* out, float* scratch, uint32_t* tickets, int batch, int heads, int kv_heads,
                                int dim, int capacity, int group_tokens, int front_tokens, int window, float scaling,
                                float softcap, const int* positions, float* slot_scores, float2* totals, int bfloat16,
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
                            tickets,
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
  return launch_h2o_count(
      {slot_scores, totals, mask, mask_row_stride, mask_columns, scores, counts, batch, heads, kv_heads, capacity},
      nullptr);
}

// 0 static, 1 int8.
EXPORT int emulated_attn_step(int format, NEW_TOKENS, void* k_data, void* k_scale, void* v_data, void* v_scale,
                              const uint8_t* mask, int64_t mask_row_stride, int64_t mask_columns, void* out,
                              float* scratch, uint32_t* tickets, float scaling, int bfloat16) {
  AttnDecodeArgs args{};
  args.query = query_out;
  args.keys = {k_data, k_scale, nullptr, nullptr}, args.values = {v_data, v_scale, nullptr, nullptr};
  args.lengths = lengths, args.length_stride = 1;
  args.mask = mask, args.mask_row_stride = mask_row_stride, args.mask_columns = mask_columns;
  args.out = out, args.scratch = scratch, args.tickets = tickets;
  args.batch = batch, args.heads = heads, args.kv_heads = kv_heads, args.dim = dim;
  args.capacity = static_cast<int>(capacity), args.scaling = scaling;
  const Dtype dtype = dtype_of(bfloat16);
  if (format == 0) return launch_attn_step_static(args, NEW_TOKENS_ARGS, {k_data, v_data}, dtype, nullptr);
  return launch_attn_step_int8(args, NEW_TOKENS_ARGS, {{k_data, k_scale}, {v_data, v_scale}}, dtype, nullptr);
}

EXPORT int emulated_attn_received(const void* query, const void* key, const float* lse, int64_t lse_stride,
                                  const int32_t* positions, int64_t position_stride, const uint8_t* mask,
                                  int64_t mask_stride_batch, int64_t mask_stride_query, int64_t first, float* out,
                                  int batch, int heads, int kv_heads, int tokens, int keys, int old_keys, int dim,
                                  float scaling, int bfloat16) {
  const AttnReceivedArgs args{
      query,  key, lse,   lse_stride, positions, position_stride, mask, mask_stride_batch, mask_stride_query,
      first,  out, batch, heads,      kv_heads,  tokens,          keys, old_keys,          dim,
      scaling};
  return launch_attn_received(args, dtype_of(bfloat16), nullptr);
}

// `dtype`: 0 float16, 1 bfloat16, 2 float32.
EXPORT int emulated_short_conv(const void* bcx, int64_t stride_batch, int64_t stride_token, void* state,
                               const void* weight, const void* bias, const uint8_t* mask, int64_t mask_stride_batch,
                               int64_t mask_stride_token, void* out, int batch, int tokens, int channels, int taps,
                               int dtype, int sm_count) {
  const ShortConvArgs args{
      bcx, stride_batch, stride_token, state,    weight, bias, mask, mask_stride_batch, mask_stride_token,
      out, batch,        tokens,       channels, taps};
  constexpr Dtype kDtypes[] = {Dtype::kFloat16, Dtype::kBFloat16, Dtype::kFloat32};
  return launch_short_conv(args, kDtypes[dtype], sm_count, nullptr);
}

// The arguments of emulated_w4a16_linear(), then those of the convolution.
EXPORT int emulated_w4a16_short_conv(const void* x, int64_t x_row_stride, const void* qweight, const void* scales,
                                     const uint8_t* zeros, const void* bias, void* y, int m, int n, int k,
                                     int group_size, const void* norm_weight, float eps, void* state,
                                     const void* conv_weight, const void* conv_bias, const uint8_t* mask,
                                     int64_t mask_stride, int channels, int taps, void* normalized, int bfloat16,
                                     int sm_count) {
  const W4A16LinearArgs args{x, x_row_stride, qweight,     scales, zeros,   bias,      y, m, n,
                             k, group_size,   norm_weight, eps,    nullptr, normalized};
  ShortConvArgs conv = {};
  conv.state = state, conv.weight = conv_weight, conv.bias = conv_bias;
  conv.mask = mask, conv.mask_stride_batch = mask_stride;
  conv.channels = channels, conv.taps = taps;
  return launch_w4a16_short_conv(args, conv, dtype_of(bfloat16), sm_count, nullptr);
}

EXPORT int emulated_moe_router(const void* x, const void* weight, const float* bias, void* logits, void* shares,
                               int64_t* experts, int rows, int hidden, int expert_count, int top_k, int normalize,
                               float scaling, const void* norm_weight, float norm_eps, void* normalized, int bfloat16,
                               int sm_count) {
  const MoeRouterArgs args{x,    weight, bias,         logits, shares,         experts,
                           rows, hidden, expert_count, top_k,  normalize != 0, scaling};
  return launch_moe_router(args, norm_weight, norm_eps, normalized, dtype_of(bfloat16), sm_count, nullptr);
}

// `workspace_bytes`: only says how many those of variants other than 0 are.
EXPORT int emulated_moe_experts(const void* x, const int64_t* experts, const void* shares, const void* up_qweight,
                                const void* up_scales, const uint8_t* up_zeros, int up_group, const void* down_qweight,
                                const void* down_scales, const uint8_t* down_zeros, int down_group,
                                const void* residual, void* workspace, void* y, int rows, int top_k, int expert_count,
                                int hidden, int intermediate, int variant, int bfloat16, int sm_count,
                                int64_t* workspace_bytes) {
  const MoeExpertsArgs args{x,
                            experts,
                            shares,
                            {up_qweight, up_scales, up_zeros, up_group},
                            {down_qweight, down_scales, down_zeros, down_group},
                            workspace,
                            y,
                            rows,
                            top_k,
                            expert_count,
                            hidden,
                            intermediate};
  if (workspace_bytes) {
    *workspace_bytes = moe_grouped_workspace_bytes(args);
    return 0;
  }
  if (variant == 0) return launch_moe_experts(args, residual, dtype_of(bfloat16), sm_count, nullptr);
  return launch_moe_grouped(args, residual, workspace, variant, dtype_of(bfloat16), sm_count, nullptr);
}

EXPORT int emulated_choose_tokens(const void* scores, int64_t score_row_stride, const float* noise, const int64_t* end,
                                  int end_count, const int64_t* pad, int64_t* ids, int64_t* positions,
                                  int64_t* unfinished, int64_t* done, int64_t* report, int64_t* tokens,
                                  int64_t token_row_stride, int64_t capacity, int64_t* count, void* parts, int rows,
                                  int vocabulary, int dtype, int sm_count) {
  const ChooseTokensArgs args{scores,
                              score_row_stride,
                              noise,
                              end,
                              end_count,
                              pad,
                              ids,
                              positions,
                              unfinished,
                              done,
                              report,
                              tokens,
                              token_row_stride,
                              capacity,
                              count,
                              static_cast<uint64_t*>(parts),
                              rows,
                              vocabulary};
  constexpr Dtype kDtypes[] = {Dtype::kFloat16, Dtype::kBFloat16, Dtype::kFloat32};
  return launch_choose_tokens(args, kDtypes[dtype], sm_count, nullptr);
}

EXPORT int64_t emulated_choose_tokens_parts(int rows, int vocabulary, int sm_count) {
  return choose_tokens_parts(rows, vocabulary, sm_count);
}

EXPORT int emulated_sampling_weights(const void* logits, int64_t row_stride, float* out, float factor, int top_k,
                                     float removed, float min_p, void* thresholds, int rows, int vocabulary,
                                     int dtype) {
  const SamplingWeightsArgs args{logits, row_stride, out,   factor,
                                 top_k,  removed,    min_p, static_cast<SamplingThreshold*>(thresholds),
                                 rows,   vocabulary};
  constexpr Dtype kDtypes[] = {Dtype::kFloat16, Dtype::kBFloat16, Dtype::kFloat32};
  return launch_sampling_weights(args, kDtypes[dtype], nullptr);
}

// The fields of Linear16BitArgs; `swiglu`: which of the two products it is.
EXPORT int emulated_linear_16bit(const void* x, int64_t x_row_stride, const void* weight, const void* bias, void* y,
                                 int m, int n, int k, const void* norm_weight, float eps, const void* residual,
                                 void* normalized, int float32_out, int bfloat16, int sm_count, int swiglu) {
  const Linear16BitArgs args{x,        x_row_stride, weight,          bias, y, m, n, k, norm_weight, eps,
                             residual, normalized,   float32_out != 0};
  const auto launch = swiglu ? launch_linear_16bit_swiglu : launch_linear_16bit;
  return launch(args, dtype_of(bfloat16), sm_count, nullptr);
}

EXPORT int emulated_moe_experts_16bit(const void* x, const int64_t* experts, const void* shares, const void* gate_up,
                                      const void* down, const void* residual, void* inner, void* y, int rows, int top_k,
                                      int expert_count, int hidden, int intermediate, int bfloat16, int sm_count) {
  const MoeExperts16Args args{x, experts, shares, gate_up,      down,   residual,    inner,
                              y, rows,    top_k,  expert_count, hidden, intermediate};
  return launch_moe_experts16(args, dtype_of(bfloat16), sm_count, nullptr);
}
