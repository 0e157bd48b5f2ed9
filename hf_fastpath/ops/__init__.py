"""The operators, one file each: schema, reference (which is the CPU implementation), fake, wrapper."""

from hf_fastpath.ops._append import QKTransform
from hf_fastpath.ops._library import IN_PYTHON, NAMESPACE, SCHEMAS
from hf_fastpath.ops.add_rms_norm import add_rms_norm
from hf_fastpath.ops.attn_decode_fp8 import attn_decode_fp8
from hf_fastpath.ops.attn_decode_h2o import attn_decode_h2o
from hf_fastpath.ops.attn_decode_int4 import attn_decode_int4
from hf_fastpath.ops.attn_decode_int8 import attn_decode_int8
from hf_fastpath.ops.attn_decode_static import attn_decode_static
from hf_fastpath.ops.attn_prefill_h2o import attn_prefill_h2o
from hf_fastpath.ops.attn_received import attn_received
from hf_fastpath.ops.attn_step_int8 import attn_step_int8
from hf_fastpath.ops.attn_step_static import attn_step_static
from hf_fastpath.ops.choose_tokens import TokenState, choose_tokens
from hf_fastpath.ops.embedding_rows import embedding_rows
from hf_fastpath.ops.kv_fp8_append import kv_fp8_append
from hf_fastpath.ops.kv_fp8_dequantize import kv_fp8_dequantize
from hf_fastpath.ops.kv_h2o_append import kv_h2o_append
from hf_fastpath.ops.kv_int4_append import kv_int4_append
from hf_fastpath.ops.kv_int4_dequantize import kv_int4_dequantize
from hf_fastpath.ops.kv_int8_append import kv_int8_append
from hf_fastpath.ops.kv_int8_dequantize import kv_int8_dequantize
from hf_fastpath.ops.kv_static_append import kv_static_append
from hf_fastpath.ops.linear_16bit import linear_16bit, linear_16bit_into
from hf_fastpath.ops.linear_16bit_swiglu import linear_16bit_swiglu
from hf_fastpath.ops.moe_experts import moe_experts
from hf_fastpath.ops.moe_experts_16bit import moe_experts_16bit
from hf_fastpath.ops.moe_router import moe_norm_router, moe_router
from hf_fastpath.ops.rms_norm import rms_norm
from hf_fastpath.ops.rope_angles import rope_angles
from hf_fastpath.ops.sampling_weights import sampling_weights
from hf_fastpath.ops.short_conv_prefill import short_conv_prefill
from hf_fastpath.ops.short_conv_step import short_conv_step
from hf_fastpath.ops.swiglu import swiglu
from hf_fastpath.ops.w4a16_dequantize import w4a16_dequantize
from hf_fastpath.ops.w4a16_gemm import w4a16_gemm
from hf_fastpath.ops.w4a16_gemm_swiglu import w4a16_gemm_swiglu
from hf_fastpath.ops.w4a16_linear import w4a16_linear
from hf_fastpath.ops.w4a16_linear_fused import w4a16_linear_fused
from hf_fastpath.ops.w4a16_short_conv import w4a16_short_conv
from hf_fastpath.ops.w4a16_swiglu import w4a16_swiglu
from hf_fastpath.ops.w8a16_dequantize import w8a16_dequantize
from hf_fastpath.ops.w8a16_linear import w8a16_linear

__all__ = [
    "IN_PYTHON",
    "NAMESPACE",
    "SCHEMAS",
    "QKTransform",
    "TokenState",
    "add_rms_norm",
    "attn_decode_fp8",
    "attn_decode_h2o",
    "attn_decode_int4",
    "attn_decode_int8",
    "attn_decode_static",
    "attn_prefill_h2o",
    "attn_received",
    "attn_step_int8",
    "attn_step_static",
    "choose_tokens",
    "embedding_rows",
    "kv_fp8_append",
    "kv_fp8_dequantize",
    "kv_h2o_append",
    "kv_int4_append",
    "kv_int4_dequantize",
    "kv_int8_append",
    "kv_int8_dequantize",
    "kv_static_append",
    "linear_16bit",
    "linear_16bit_into",
    "linear_16bit_swiglu",
    "moe_experts",
    "moe_experts_16bit",
    "moe_norm_router",
    "moe_router",
    "rms_norm",
    "rope_angles",
    "sampling_weights",
    "short_conv_prefill",
    "short_conv_step",
    "swiglu",
    "w4a16_dequantize",
    "w4a16_gemm",
    "w4a16_gemm_swiglu",
    "w4a16_linear",
    "w4a16_linear_fused",
    "w4a16_short_conv",
    "w4a16_swiglu",
    "w8a16_dequantize",
    "w8a16_linear",
]
