// The host entry points of the kernels. Raw pointers, sizes and a stream: kernels do not know torch.
// Every launcher returns the error of its launch (cudaGetLastError), so that nothing fails silently. The packed
// layouts are described in hf_fastpath/packing.py (int4) and packing_int8.py.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

namespace hf_fastpath {

enum class Dtype { kFloat16, kBFloat16, kFloat32 };  // kFloat32: of some kernels only

// ---- w4a16_linear.cu, w4a16_linear_fused.cu, w4a16_swiglu.cu --------------------------------------------------------
struct W4A16LinearArgs {
  const void* x;  // (m, k), rows x_row_stride elements apart, aligned to one element only (fused: to 16 bytes)
  int64_t x_row_stride;
  const void* qweight;   // (ceil(n/16), ceil(k/64), 32, 4) int32, 16-byte aligned
  const void* scales;    // (ceil(n/16), k/group, 16), 4-byte aligned
  const uint8_t* zeros;  // like scales, 4-byte aligned; nullptr: symmetric
  const void* bias;      // (n,) or nullptr
  void* y;               // (m, n) contiguous; of swiglu (m, n / 2)
  int m, n, k;
  int group_size;  // 32, 64, 128
  // Of the fused products only:
  const void* norm_weight;  // (k,), 16-byte aligned: x is replaced by its RMSNorm; or nullptr
  float eps;
  const void* residual;  // (m, n) contiguous, or nullptr; not of swiglu
  void* normalized;      // (m, k), 16-byte aligned: where x's RMSNorm goes if w4a16_norm_is_apart()
};
constexpr int kMaxLinearRows = 16;
cudaError_t launch_w4a16_linear(const W4A16LinearArgs& args, Dtype dtype, int sm_count, cudaStream_t stream);
cudaError_t launch_w4a16_linear_fused(const W4A16LinearArgs& args, Dtype dtype, int sm_count, cudaStream_t stream);
cudaError_t launch_w4a16_swiglu(const W4A16LinearArgs& args, Dtype dtype, int sm_count, cudaStream_t stream);

// Whether a fused product wants x's RMSNorm from a kernel of its own, which it then launches before.
bool w4a16_norm_is_apart(const W4A16LinearArgs& args);

// ---- linear_16bit.cu, linear_16bit_swiglu.cu ------------------------------------------------------------------------
struct Linear16BitArgs {
  const void* x;  // (m, k), rows x_row_stride elements apart, all of them aligned to 16 bytes
  int64_t x_row_stride;
  const void* weight;  // (n, k) contiguous, 16-byte aligned
  const void* bias;    // (n,) or nullptr
  void* y;             // (m, n) contiguous; of swiglu (m, n / 2)
  int m, n, k;         // k a multiple of 32
  // As in W4A16LinearArgs, with linear_16bit_norm_is_apart():
  const void* norm_weight;
  float eps;
  const void* residual;
  void* normalized;
  bool float32_out;  // y is float32, of values that are rounded to the dtype all the same; not of swiglu
};
cudaError_t launch_linear_16bit(const Linear16BitArgs& args, Dtype dtype, int sm_count, cudaStream_t stream);
cudaError_t launch_linear_16bit_swiglu(const Linear16BitArgs& args, Dtype dtype, int sm_count, cudaStream_t stream);
bool linear_16bit_norm_is_apart(const Linear16BitArgs& args);

// ---- rms_norm.cu ----------------------------------------------------------------------------------------------------
struct RmsNormArgs {
  const void* x;  // (m, k), rows x_row_stride elements apart, all of them aligned to 16 bytes
  int64_t x_row_stride;
  const void* weight;  // (k,), 16-byte aligned
  float eps;
  void* y;   // (m, k) contiguous, 16-byte aligned
  int m, k;  // k a multiple of 8
};
cudaError_t launch_rms_norm(const RmsNormArgs& args, Dtype dtype, cudaStream_t stream);
// The same of sums = x + residual. residual, sums: (m, k) contiguous, 16-byte aligned.
cudaError_t launch_add_rms_norm(const RmsNormArgs& args, const void* residual, void* sums, Dtype dtype,
                                cudaStream_t stream);

// ---- swiglu.cu ------------------------------------------------------------------------------------------------------
// x (rows, 2 * columns): gates, then ups; y (rows, columns). Both contiguous and 16-byte aligned, columns a multiple of
// 8.
cudaError_t launch_swiglu(const void* x, void* y, int rows, int columns, Dtype dtype, cudaStream_t stream);

// ---- embedding_rows.cu ----------------------------------------------------------------------------------------------
struct EmbeddingRowsArgs {
  const int64_t* ids;  // (rows,), each in 0 .. vocabulary - 1
  const void* weight;  // (vocabulary, row_vectors * 16 bytes), 16-byte aligned
  void* y;             // (rows, row_vectors * 16 bytes)
  int64_t vocabulary;
  int rows, row_vectors;
};
cudaError_t launch_embedding_rows(const EmbeddingRowsArgs& args, cudaStream_t stream);

// ---- rope_angles.cu -------------------------------------------------------------------------------------------------
// positions (rows,), inv_freq (half,), cos and sin (rows, 2 * half), rows and half at least 1; all contiguous.
cudaError_t launch_rope_angles(const int64_t* positions, const float* inv_freq, float scaling, void* cos, void* sin,
                               int rows, int half, Dtype dtype, cudaStream_t stream);

// ---- w4a16_gemm.cu --------------------------------------------------------------------------------------------------
struct W4A16GemmArgs {
  const void* x;  // as in W4A16LinearArgs, with any number of rows
  int64_t x_row_stride;
  const void* qweight;
  const void* scales;    // 16-byte aligned
  const uint8_t* zeros;  // 16-byte aligned; nullptr: symmetric
  const void* bias;
  void* y;
  float* workspace;  // w4a16_gemm_workspace_floats() floats, 16-byte aligned, or nullptr when that is 0
  int m, n, k;
  int group_size;
  int variant;           // 0 .. kW4A16GemmVariants - 1, see hf_fastpath/ops/w4a16_gemm.py
  const void* residual;  // (m, n), added to the product; nullptr: none
};
constexpr int kW4A16GemmVariants = 18;
int64_t w4a16_gemm_workspace_floats(int m, int n, int k, int variant, int sm_count);
// cudaErrorNoKernelImageForDevice when the variant is not for this GPU, or was not compiled for it.
cudaError_t launch_w4a16_gemm(const W4A16GemmArgs& args, Dtype dtype, int sm_count, cudaStream_t stream);
// w4a16_gemm_sm90.cu: the variants with wgmma, which launch_w4a16_gemm() passes on.
cudaError_t launch_w4a16_gemm_sm90(const W4A16GemmArgs& args, Dtype dtype, int sm_count, cudaStream_t stream);

// ---- w4a16_gemm_swiglu.cu: SwiGLU of the product with a merged gate and up weight -----------------------------------
// n: the weight's rows, a multiple of 32, gates first; y (m, n / 2); no workspace, no residual. Only of some variants.
bool w4a16_gemm_swiglu_has(int variant);
cudaError_t launch_w4a16_gemm_swiglu(const W4A16GemmArgs& args, Dtype dtype, int sm_count, cudaStream_t stream);

// ---- w4a16_dequantize.cu --------------------------------------------------------------------------------------------
struct W4A16DequantizeArgs {
  const void* qweight;
  const void* scales;
  const uint8_t* zeros;
  void* out;  // (n, k) contiguous, 16-byte aligned
  int n, k, group_size;
};
cudaError_t launch_w4a16_dequantize(const W4A16DequantizeArgs& args, Dtype dtype, cudaStream_t stream);

// ---- w8a16_linear.cu ------------------------------------------------------------------------------------------------
struct W8A16LinearArgs {
  const void* x;  // (m, k), rows x_row_stride elements apart, aligned to one element only
  int64_t x_row_stride;
  const void* qweight;  // (ceil(n/16), k/32, 32, 16) int8, 16-byte aligned
  const void* scales;   // (n,)
  const void* bias;     // (n,) or nullptr
  void* y;              // (m, n) contiguous
  int m, n, k;
};
cudaError_t launch_w8a16_linear(const W8A16LinearArgs& args, Dtype dtype, int sm_count, cudaStream_t stream);

// ---- w8a16_dequantize.cu --------------------------------------------------------------------------------------------
struct W8A16DequantizeArgs {
  const void* qweight;
  const void* scales;
  void* out;  // (n, k) contiguous, 16-byte aligned
  int n, k;
};
cudaError_t launch_w8a16_dequantize(const W8A16DequantizeArgs& args, Dtype dtype, cudaStream_t stream);

// ---- what appends to the caches (csrc/kv/) -------------------------------------------------------------------------
// The storage is described in hf_fastpath/caches/, by the layer of each format; all of it is aligned to 16 bytes.
struct KvRows {  // (batch, heads, tokens, dim), the last dimension contiguous, aligned to one element only
  const void* data;
  int64_t stride_batch, stride_head, stride_token;  // elements
};
struct KvAngles {  // cosines or sines (batch or 1, tokens, rotary_dim), alike
  const void* data;
  int64_t stride_batch, stride_token;
};
constexpr int kMaxKvDim = 256;
struct KvNewTokens {
  KvRows query, key, value;  // query.data: nullptr when there is none
  void* query_out;           // (batch, heads, tokens, dim) contiguous, 16-byte aligned; or as query_by_token says
  const void* q_norm;        // (dim,), or nullptr; with a query both norms or none
  const void* k_norm;
  float eps;
  KvAngles cos, sin;
  int rotary_dim;                           // a multiple of 16 up to dim; 0: no RoPE
  float rotation;                           // rotation_factor(dim) to rotate queries and keys; 0: not
  int batch, heads, kv_heads, tokens, dim;  // dim: a multiple of 8 up to kMaxKvDim
  int64_t capacity;                         // entries of the storage
  // (batch, kv_heads): tokens stored, to which the launch adds `tokens`; nullptr, of launch_kv_static_append() alone:
  // there are none, and nobody counts.
  int32_t* lengths;
  bool query_by_token;  // query_out lies as (batch, tokens, heads, dim)
};
// Keys or values as they are stored.
struct KvQuantizedSide {
  void* data;
  void* scale;  // of int4: the parameters
};
// What makes the Hadamard transform of a head orthonormal (hf_fastpath/ops/_rotation.py).
inline float rotation_factor(int dim) {
  return 1.0f / std::sqrt(static_cast<float>(dim & -dim));
}

// ---- kv_static.cu ---------------------------------------------------------------------------------------------------
struct KvStaticStorage {
  void* keys;
  void* values;
};
cudaError_t launch_kv_static_append(const KvNewTokens& tokens, const KvStaticStorage& storage, Dtype dtype,
                                    cudaStream_t stream);

// ---- kv_int8.cu -----------------------------------------------------------------------------------------------------
struct KvInt8Storage {
  KvQuantizedSide key, value;
};
cudaError_t launch_kv_int8_append(const KvNewTokens& tokens, const KvInt8Storage& storage, Dtype dtype,
                                  cudaStream_t stream);

struct KvDequantizeArgs {
  const int8_t* data;  // (pairs, capacity, dim), pairs = batch * heads
  const void* scale;   // (pairs, capacity) fp16
  void* out;           // (pairs, length, dim)
  int64_t pairs, capacity, length;
  int dim;
};
cudaError_t launch_kv_int8_dequantize(const KvDequantizeArgs& args, Dtype dtype, cudaStream_t stream);

// ---- kv_fp8.cu, kv_int4.cu: tokens in groups, and some in full precision --------------------------------------------
constexpr int kFp8Group = 64;  // tokens
struct KvFullSide {
  void* tail;   // (batch, kv_heads, group, dim)
  void* sinks;  // (batch, kv_heads, sinks, dim)
};
struct KvGroupedStorage {
  KvQuantizedSide quantized[2];  // keys, values
  KvFullSide full[2];
  int group, sinks;  // tokens; group: 32 or 64
  int value_parts;   // of int4: kv_int4_value_parts(dim)
};
cudaError_t launch_kv_fp8_append(const KvNewTokens& tokens, const KvGroupedStorage& storage, Dtype dtype,
                                 cudaStream_t stream);
// The parts of a value that share a scale (value_groups() in hf_fastpath/ops/kv_int4_append.py): their channels must be
// a multiple of 8.
inline int kv_int4_value_parts(int dim) {
  int parts = (dim + 63) / 64;
  while (dim % parts) ++parts;
  return parts;
}
cudaError_t launch_kv_int4_append(const KvNewTokens& tokens, const KvGroupedStorage& storage, Dtype dtype,
                                  cudaStream_t stream);

struct KvExpandArgs {
  KvQuantizedSide quantized;
  KvFullSide full;
  const int32_t* lengths;  // (pairs,): tokens stored
  void* out;               // (pairs, length, dim) contiguous, 16-byte aligned: tokens first .. first + length
  int64_t pairs, capacity, first, length;
  int dim, group, sinks;
  bool values;      // of int4: whether these are values
  int value_parts;  // of int4: kv_int4_value_parts(dim)
};
cudaError_t launch_kv_fp8_dequantize(const KvExpandArgs& args, Dtype dtype, cudaStream_t stream);
cudaError_t launch_kv_int4_dequantize(const KvExpandArgs& args, Dtype dtype, cudaStream_t stream);

// ---- kv_h2o.cu ------------------------------------------------------------------------------------------------------
struct KvH2OStorage {
  KvQuantizedSide key, value;  // capacity: the budget, a multiple of 4
  float* scores;               // (batch, kv_heads, capacity)
  int32_t* positions;          // alike
  int window, sinks;
};
// One token a row. `lengths` are the counts, (batch, kv_heads, 2).
cudaError_t launch_kv_h2o_append(const KvNewTokens& tokens, const KvH2OStorage& storage, Dtype dtype,
                                 cudaStream_t stream);

// ---- attn_received.cu -----------------------------------------------------------------------------------------------
struct AttnReceivedArgs {
  const void* query;         // (batch, heads, tokens, dim) contiguous, 16-byte aligned; dim: a multiple of 8 up to 256
  const void* key;           // (batch, kv_heads, keys, dim) alike: old ones, then those of the queries' tokens
  const float* lse;          // (batch, heads, >= tokens): of each query, the logarithm of the sum of exp(score);
                             // minus infinity for one that does not count
  int64_t lse_stride;        // of a head
  const int32_t* positions;  // (batch, kv_heads, >= old_keys): numbers of the old keys' tokens
  int64_t position_stride;   // of a KV head
  const uint8_t* mask;       // (batch, tokens, >= first + tokens) of 0 and 1, or nullptr
  int64_t mask_stride_batch, mask_stride_query;
  int64_t first;  // the number of the first query's token
  float* out;     // (batch, heads, keys)
  int batch, heads, kv_heads, tokens, keys, old_keys, dim;
  float scaling;
};
cudaError_t launch_attn_received(const AttnReceivedArgs& args, Dtype dtype, cudaStream_t stream);

// ---- attn_decode_*.cu -----------------------------------------------------------------------------------------------
// Keys or values as a cache stores them, nullptr being what its format does not have. Every layout is described by its
// layer's docstring in hf_fastpath/caches/. All are contiguous and aligned to 16 bytes.
struct KvSide {
  const void* data;   // (batch, kv_heads, capacity, ...): the tokens, or their codes
  const void* scale;  // of the codes: a token's, a group's, or int4's parameters
  const void* tail;   // fp8, int4: the tokens of the group that is not full
  const void* front;  // int4: the first tokens
};
struct AttnDecodeArgs {
  const void* query;  // (batch, heads, dim)
  KvSide keys, values;
  const int* lengths;  // (batch, kv_heads), length_stride elements apart: tokens stored, those in front included
  int length_stride;
  const uint8_t* mask;  // (batch, mask_columns) of 0 and 1, or nullptr; tokens beyond its columns are not attended
  int64_t mask_row_stride, mask_columns;
  const float* sinks;  // (heads,): a logit each, which takes part in the softmax and has no value; or nullptr
  void* out;           // (batch, heads, dim)
  float* scratch;      // attn_decode_scratch_floats() floats, 16-byte aligned, or nullptr when that is 0
  uint32_t* tickets;   // (batch, kv_heads), all 0, as the launch leaves them; nullptr when scratch is
  int batch, heads, kv_heads, dim;
  int capacity;                    // tokens, a multiple of 16; of fp8 and int4 of group_tokens, those in front excepted
  int group_tokens, front_tokens;  // fp8: 64 and 0, int4: 32 or 64 and any number; else 0
  int window;                      // only the last so many tokens are attended; 0: all
  float scaling, softcap;          // softcap: scores become softcap * tanh(score / softcap); 0: they do not
  // Of h2o only, whose tokens are those of the first min(length, capacity) slots:
  const int* positions;  // (batch, kv_heads, capacity): the token that a slot holds, which is what the mask is of
  float* slot_scores;    // (batch, heads, capacity), written: scores in log2 units
  float2* totals;        // (batch, heads), written: the maximum of them, and the inverse of the sum of weights
};
int64_t attn_decode_static_scratch_floats(const AttnDecodeArgs& args);
cudaError_t launch_attn_decode_static(const AttnDecodeArgs& args, Dtype dtype, cudaStream_t stream);
int64_t attn_decode_int8_scratch_floats(const AttnDecodeArgs& args);
cudaError_t launch_attn_decode_int8(const AttnDecodeArgs& args, Dtype dtype, cudaStream_t stream);
int64_t attn_decode_fp8_scratch_floats(const AttnDecodeArgs& args);
cudaError_t launch_attn_decode_fp8(const AttnDecodeArgs& args, Dtype dtype, cudaStream_t stream);
int64_t attn_decode_int4_scratch_floats(const AttnDecodeArgs& args);
cudaError_t launch_attn_decode_int4(const AttnDecodeArgs& args, Dtype dtype, cudaStream_t stream);
int64_t attn_decode_h2o_scratch_floats(const AttnDecodeArgs& args);
cudaError_t launch_attn_decode_h2o(const AttnDecodeArgs& args, Dtype dtype, cudaStream_t stream);

// Attention of the row's new token, which is appended first: `tokens` has one a row, their queries, and the storage and
// lengths of `args`. tokens.query_out is args.query: the transformed queries go there if that takes a kernel of its
// own.
cudaError_t launch_attn_step_static(const AttnDecodeArgs& args, const KvNewTokens& tokens,
                                    const KvStaticStorage& storage, Dtype dtype, cudaStream_t stream);
cudaError_t launch_attn_step_int8(const AttnDecodeArgs& args, const KvNewTokens& tokens, const KvInt8Storage& storage,
                                  Dtype dtype, cudaStream_t stream);

// What launch_attn_decode_h2o() leaves to count: every slot's weights, summed over the query heads that read its KV
// head, and leading padding.
struct H2OCountArgs {
  const float* slot_scores;  // of AttnDecodeArgs, as what has no comment
  const float2* totals;
  const uint8_t* mask;
  int64_t mask_row_stride, mask_columns;
  float* scores;  // (batch, kv_heads, capacity)
  int* counts;    // (batch, kv_heads, 2): tokens that there were, leading ones that are padding
  int batch, heads, kv_heads, capacity;
};
cudaError_t launch_h2o_count(const H2OCountArgs& args, cudaStream_t stream);

// ---- short_conv.cu --------------------------------------------------------------------------------------------------
struct ShortConvArgs {
  const void* bcx;  // (batch, tokens, 3 channels): B, C and x, contiguous in the last dimension, tokens >= 1
  int64_t stride_batch, stride_token;  // elements
  void* state;                         // (batch, channels, taps) contiguous, changed in place
  const void* weight;                  // (channels, taps) contiguous
  const void* bias;                    // (channels,), or nullptr
  const uint8_t* mask;                 // (batch, tokens) of 0 and 1, or nullptr
  int64_t mask_stride_batch, mask_stride_token;
  void* out;  // (batch, tokens, channels) contiguous, 16-byte aligned
  int batch, tokens, channels, taps;
};
constexpr int kMinConvTaps = 2, kMaxConvTaps = 8;
cudaError_t launch_short_conv(const ShortConvArgs& args, Dtype dtype, int sm_count, cudaStream_t stream);

// ---- w4a16_short_conv.cu --------------------------------------------------------------------------------------------
// One token a row: bcx are the rows of a fused product with a norm, n = 3 channels, y (m, channels), no residual. Of
// `conv` it takes the state, the weights, a mask of the rows, and channels (a multiple of 16) and taps.
cudaError_t launch_w4a16_short_conv(const W4A16LinearArgs& args, const ShortConvArgs& conv, Dtype dtype, int sm_count,
                                    cudaStream_t stream);

// ---- moe_router.cu --------------------------------------------------------------------------------------------------
struct MoeRouterArgs {
  const void* x;       // (rows, hidden) contiguous, 16-byte aligned; hidden: a multiple of 32
  const void* weight;  // (expert_count, hidden) alike
  const float* bias;   // (expert_count,) or nullptr
  void* logits;        // (rows, expert_count)
  void* shares;        // (rows, top_k)
  int64_t* experts;    // (rows, top_k)
  int rows, hidden, expert_count, top_k;
  bool normalize;
  float scaling;
};
constexpr int kMaxRouterExperts = 256, kMaxRouterTopK = 32;
// norm_weight: (hidden,), 16-byte aligned, of an RMSNorm of x that comes first and is stored in `normalized`, which is
// as x is; or both nullptr.
cudaError_t launch_moe_router(const MoeRouterArgs& args, const void* norm_weight, float norm_eps, void* normalized,
                              Dtype dtype, int sm_count, cudaStream_t stream);

// ---- moe_experts.cu -------------------------------------------------------------------------------------------------
// The experts' packed weights of one product, one after the other, 16-byte aligned as W4A16GemmArgs has one's.
struct MoeWeight {
  const void* qweight;
  const void* scales;
  const uint8_t* zeros;  // or nullptr
  int group_size;
};
struct MoeExpertsArgs {
  const void* x;           // (rows, hidden) contiguous, 16-byte aligned
  const int64_t* experts;  // (rows, top_k)
  const void* shares;      // (rows, top_k)
  MoeWeight gate_up;       // (2 * intermediate, hidden) each
  MoeWeight down;          // (hidden, intermediate) each
  void* inner;             // (rows * top_k, intermediate) to work with, 16-byte aligned; of moe_experts.cu
  void* y;                 // (rows, hidden)
  int rows, top_k, expert_count, hidden, intermediate;
};
constexpr int kMaxTopK = 256;
// residual: (rows, hidden), added before y is rounded; or nullptr.
cudaError_t launch_moe_experts(const MoeExpertsArgs& args, const void* residual, Dtype dtype, int sm_count,
                               cudaStream_t stream);

// ---- moe_grouped_sm90.cu: the same for many rows, compute capability 9.0 --------------------------------------------
// Rows are taken in turns of at most kMaxGroupedPairs pairs of a row and an expert; `workspace` has
// moe_grouped_workspace_bytes() for one turn, 16-byte aligned.
constexpr int kMaxGroupedPairs = 16384, kMaxGroupedExperts = 256;
constexpr int kMoeVariants = 5;  // hf_fastpath/ops/moe_experts.py has the table; 0 is launch_moe_experts()
int64_t moe_grouped_workspace_bytes(const MoeExpertsArgs& args);
cudaError_t launch_moe_grouped(const MoeExpertsArgs& args, const void* residual, void* workspace, int variant,
                               Dtype dtype, int sm_count, cudaStream_t stream);

// ---- moe_experts16.cu: experts whose weights are in 16 bits ---------------------------------------------------------
struct MoeExperts16Args {
  const void* x;           // (rows, hidden) contiguous, 16-byte aligned; hidden and intermediate: multiples of 32
  const int64_t* experts;  // (rows, top_k)
  const void* shares;      // (rows, top_k)
  const void* gate_up;     // (expert_count, 2 * intermediate, hidden), 16-byte aligned
  const void* down;        // (expert_count, hidden, intermediate), 16-byte aligned
  const void* residual;    // (rows, hidden), or nullptr
  void* inner;             // (rows * top_k, intermediate) to work with, 16-byte aligned
  void* y;                 // (rows, hidden)
  int rows, top_k, expert_count, hidden, intermediate;
};
cudaError_t launch_moe_experts16(const MoeExperts16Args& args, Dtype dtype, int sm_count, cudaStream_t stream);

}  // namespace hf_fastpath
