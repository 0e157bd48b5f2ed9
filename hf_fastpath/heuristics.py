"""Which implementation computes what: pure functions of shapes and devices, tested without a GPU."""

from __future__ import annotations

import enum

from hf_fastpath.ops.w4a16_gemm import TILE_OUTPUTS, VARIANTS
from hf_fastpath.ops.w4a16_linear import MAX_ROWS
from hf_fastpath.packing import ceil_div


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
    # w4a16_gemm was written for more than 16 rows, but no GPU has run it yet: the path that was verified on hardware
    # stays the choice until eval/bench_ops.py has compared the two. Who wants it asks w4a16_gemm_variant().
    if device_type == "cpu":
        return W4A16Variant.CPU_INT4PACK
    if reference:
        return W4A16Variant.REFERENCE
    return W4A16Variant.CUDA_KERNEL if rows <= MAX_ROWS else W4A16Variant.CUDA_DEQUANTIZE


def w4a16_gemm_runs_on(variant: int, capability: tuple[int, int]) -> bool:
    """Whether a variant of w4a16_gemm runs on GPUs of this compute capability: whether they have its instructions."""
    return capability == (9, 0) if VARIANTS[variant].instruction == "wgmma" else capability >= (8, 0)


# What a CTA does besides multiplying, in the time of 128 columns of K: starting; and where a cluster divides K, adding.
_START, _SUM = 1, 2


def w4a16_gemm_variant(
    rows: int, out_features: int, in_features: int, capability: tuple[int, int], sm_count: int
) -> int:
    """The variant of w4a16_gemm to try first for ``(rows, in_features)`` times ``(out_features, in_features)``.

    By reasoning, not yet by measurement: the smallest tile that has all rows, or the largest; and of the divisions of
    K the one whose busiest multiprocessor has the least to do.
    """
    forms = [i for i in range(len(VARIANTS)) if w4a16_gemm_runs_on(i, capability)]
    forms = [i for i in forms if VARIANTS[i].instruction == "wgmma"] or forms
    sizes = {VARIANTS[i].tokens for i in forms}
    tokens = min((size for size in sizes if size >= rows), default=max(sizes))
    tiles = ceil_div(out_features, TILE_OUTPUTS) * ceil_div(rows, tokens)
    units = ceil_div(in_features, 128)

    def work(variant: int) -> int:
        splits = max(VARIANTS[variant].splits, 1)
        waves = ceil_div(tiles * splits, sm_count)
        return waves * (ceil_div(units, splits) + _START + (_SUM if splits > 1 else 0))

    return min((i for i in forms if VARIANTS[i].tokens == tokens), key=work)


def attn_decode_int8_supports(head_dim: int) -> bool:
    """Whether the CUDA kernel takes this head size (the CPU implementation takes any)."""
    return head_dim % 16 == 0 and 16 <= head_dim <= 256
