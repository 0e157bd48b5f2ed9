"""Which implementation computes what: pure functions of shapes and devices, tested without a GPU."""

from __future__ import annotations

import enum
import math

from hf_fastpath.ops.w4a16_gemm import VARIANTS
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
    # w4a16_gemm was written for more than 16 rows, but no GPU has run it yet: the path that was verified on hardware
    # stays the choice until eval/bench_ops.py has compared the two. Who wants it asks w4a16_gemm_variant().
    if device_type == "cpu":
        return W4A16Variant.CPU_INT4PACK
    if reference:
        return W4A16Variant.REFERENCE
    return W4A16Variant.CUDA_KERNEL if rows <= MAX_ROWS else W4A16Variant.CUDA_DEQUANTIZE


def w4a16_gemm_runs_on(variant: int, capability: tuple[int, int]) -> bool:
    """Whether a variant of w4a16_gemm runs on GPUs of this compute capability: its instructions and shared memory."""
    form = VARIANTS[variant]
    if form.instruction in ("wgmma", "prefill"):
        return capability == (9, 0)
    # 8.6, 8.9 and 12.x have 99 KiB of shared memory for a CTA, too little for a ring of tiles of 256 outputs.
    return capability >= (8, 0) and (form.outputs <= 128 or capability in ((8, 0), (8, 7), (9, 0), (10, 0), (10, 3)))


def w4a16_gemm_variant(rows: int, out_features: int, capability: tuple[int, int], sm_count: int) -> int:
    """The variant of w4a16_gemm to try first for that many rows of x; by reasoning, not yet by measurement.

    The more outputs a tile has, the fewer times x is read from the L2; a tile of more tokens than there are is a waste;
    and where whole tiles would leave multiprocessors idle for more than a tenth of the time, K is divided.
    """
    forms = [i for i in range(len(VARIANTS)) if w4a16_gemm_runs_on(i, capability)]
    forms = [i for i in forms if VARIANTS[i].instruction != "mma"] or forms
    enough = min((VARIANTS[i].tokens for i in forms if VARIANTS[i].tokens >= rows), default=0)
    tokens = enough or max(VARIANTS[i].tokens for i in forms)
    forms = [i for i in forms if VARIANTS[i].tokens == tokens]
    # Twice the outputs in a tile only where the tiles are still at least as many as the multiprocessors.
    outputs = {VARIANTS[i].outputs for i in forms}
    tiles = {size: -(-out_features // size) * -(-rows // tokens) for size in outputs}
    wide = max(outputs)
    outputs_of_tile = wide if tokens < 128 or tiles[wide] >= sm_count else min(outputs)
    waves = tiles[outputs_of_tile] / sm_count
    split = waves / math.ceil(waves) < 0.9
    forms = [i for i in forms if VARIANTS[i].outputs == outputs_of_tile]
    return next((i for i in forms if VARIANTS[i].split is split), forms[0])


def attn_decode_int8_supports(head_dim: int) -> bool:
    """Whether the CUDA kernel takes this head size (the CPU implementation takes any)."""
    return head_dim % 16 == 0 and 16 <= head_dim <= 256
