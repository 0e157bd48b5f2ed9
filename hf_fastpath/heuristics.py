"""Which implementation computes what: pure functions of shapes and devices, tested without a GPU."""

from __future__ import annotations

import enum

from hf_fastpath.ops.w4a16_linear import MAX_ROWS


class W4A16Variant(enum.Enum):
    """How a W4A16 product is computed."""

    REFERENCE = "reference"
    CPU_INT4PACK = "torch _weight_int4pack_mm_for_cpu"
    CUDA_KERNEL = "w4a16_linear kernel"
    CUDA_DEQUANTIZE = "w4a16_dequantize kernel, then cuBLAS"


class W8A16Variant(enum.Enum):
    """How a W8A16 product is computed."""

    REFERENCE = "reference"
    CPU_INT8PACK = "torch _weight_int8pack_mm"
    CUDA_KERNEL = "w8a16_linear kernel"
    CUDA_DEQUANTIZE = "w8a16_dequantize kernel, then cuBLAS"


def w8a16_variant(device_type: str, rows: int, reference: bool = False) -> W8A16Variant:
    """As :func:`w4a16_variant`, for int8."""
    if device_type == "cpu":
        return W8A16Variant.CPU_INT8PACK
    if reference:
        return W8A16Variant.REFERENCE
    return W8A16Variant.CUDA_KERNEL if rows <= MAX_ROWS else W8A16Variant.CUDA_DEQUANTIZE


def w4a16_variant(device_type: str, rows: int, reference: bool = False) -> W4A16Variant:
    """The variant for ``rows`` rows of activations on ``"cpu"`` or ``"cuda"``.

    On the CPU one library kernel serves every size. On CUDA our kernel reads each weight once for up to 16 rows; with
    more rows the product is limited by arithmetic, and expanding the weight for cuBLAS costs less than it saves.
    reference: what a GPU runs that the kernels do not support.
    """
    if device_type == "cpu":
        return W4A16Variant.CPU_INT4PACK
    if reference:
        return W4A16Variant.REFERENCE
    return W4A16Variant.CUDA_KERNEL if rows <= MAX_ROWS else W4A16Variant.CUDA_DEQUANTIZE


def attn_decode_int8_supports(head_dim: int) -> bool:
    """Whether the CUDA kernel takes this head size (the CPU implementation takes any)."""
    return head_dim % 16 == 0 and 16 <= head_dim <= 256
