"""Which implementation computes what: pure functions of shapes and devices, tested without a GPU."""

from __future__ import annotations

import enum
import functools

import torch

from hf_fastpath.ops.kv_int4_append import value_groups
from hf_fastpath.ops.moe_experts import VARIANTS as EXPERTS_VARIANTS
from hf_fastpath.ops.w4a16_gemm import VARIANTS
from hf_fastpath.ops.w4a16_linear import MAX_ROWS
from hf_fastpath.packing import ceil_div

MOE_FEW_ROWS = 64  # of a mixture's rows, the most that its kernel for a few rows is taken for
SHORT_PROMPT_TOKENS = 1024  # of a row


class W4A16Variant(enum.Enum):
    """How a W4A16 product is computed."""

    REFERENCE = "reference"
    CPU_INT4PACK = "torch _weight_int4pack_mm_for_cpu"
    CUDA_KERNEL = "w4a16_linear kernel"
    CUDA_GEMM = "w4a16_gemm kernel"
    CUDA_DEQUANTIZE = "w4a16_dequantize kernel, then cuBLAS"


class W8A16Variant(enum.Enum):
    """How a W8A16 product is computed."""

    REFERENCE = "reference"
    CPU_INT8PACK = "torch _weight_int8pack_mm"
    CUDA_KERNEL = "w8a16_linear kernel"
    CUDA_DEQUANTIZE = "w8a16_dequantize kernel, then cuBLAS"


class MoEVariant(enum.Enum):
    """How a mixture of int4 experts is computed."""

    REFERENCE = "reference"
    OP = "moe_experts"
    CUDA_DEQUANTIZE = "w4a16_dequantize kernel for each chosen expert, then cuBLAS"


class Experts16Variant(enum.Enum):
    """How a mixture of 16-bit experts is computed."""

    TRANSFORMERS = "transformers' own"
    OP = "moe_experts_16bit"
    GROUPED = "torch's grouped_mm over sorted rows"


def experts16_variant(
    device_type: str, rows: int, dtype: torch.dtype, capability: tuple[int, int] = (9, 0), capturing: bool = False
) -> Experts16Variant:
    """The variant for ``rows`` rows. The op reads a chosen expert's weights once for each 64 rows or fewer; with more,
    arithmetic counts. grouped_mm waits for the GPU where torch has no kernel for it, which no CUDA graph can hold."""
    if device_type != "cuda":
        return Experts16Variant.TRANSFORMERS
    waits = dtype != torch.bfloat16 or capability[0] not in (9, 10)
    return Experts16Variant.OP if rows <= MOE_FEW_ROWS or (capturing and waits) else Experts16Variant.GROUPED


def moe_variant(
    device_type: str, rows: int, reference: bool = False, capability: tuple[int, int] = (9, 0)
) -> MoEVariant:
    """As :func:`w4a16_variant`, for a mixture of experts, whose op has no fast form for many rows on other GPUs."""
    if reference:
        return MoEVariant.REFERENCE
    few = rows <= MOE_FEW_ROWS or capability == (9, 0)
    return MoEVariant.OP if device_type == "cpu" or few else MoEVariant.CUDA_DEQUANTIZE


def moe_experts_runs_on(variant: int, capability: tuple[int, int]) -> bool:
    """As :func:`w4a16_gemm_runs_on`, for a variant of moe_experts."""
    return capability == (9, 0) if EXPERTS_VARIANTS[variant].instruction == "wgmma" else capability >= (8, 0)


def moe_experts_variant(rows: int, top_k: int, expert_count: int, capability: tuple[int, int]) -> int:
    """The variant of moe_experts for ``rows`` rows that go to ``top_k`` experts each.

    The kernel for a few rows, which reads an expert's weights once for each eight of its rows; else the smallest tile
    that has one and a half times the rows of an expert if all had as many: most of those that have more fit it too.
    """
    if rows <= MOE_FEW_ROWS or expert_count > 256 or not moe_experts_runs_on(len(EXPERTS_VARIANTS) - 1, capability):
        return 0
    each = 1.5 * rows * top_k / expert_count
    return next((i for i in range(1, len(EXPERTS_VARIANTS)) if EXPERTS_VARIANTS[i].tokens >= each), 4)


def moe_router_supports(dtype: torch.dtype, hidden: int, expert_count: int, top_k: int) -> bool:
    """Whether the CUDA kernel of the router takes such inputs. PyTorch's own operations compute the same of any."""
    return dtype in (torch.float16, torch.bfloat16) and hidden % 32 == 0 and expert_count <= 256 and top_k <= 32


def linear_16bit_supports(
    device_type: str, dtype: torch.dtype, rows: int, in_features: int, capability: tuple[int, int]
) -> bool:
    """Whether the kernels of linear_16bit and linear_16bit_swiglu take such a product, how it lies in memory aside; the
    CPU has none. torch.nn.functional.linear takes any.

    Not on GPUs whose multiprocessors have 100 KiB of shared memory (8.6, 8.9, 12.0): with more than 8 rows a CTA wants
    152 KiB.
    """
    roomy = capability in ((8, 0), (8, 7)) or 9 <= capability[0] <= 11
    fits = dtype in (torch.float16, torch.bfloat16) and 1 <= rows <= MAX_ROWS and in_features > 0
    return device_type == "cuda" and roomy and fits and in_features % 32 == 0


def rms_norm_supports(device_type: str, dtype: torch.dtype, columns: int) -> bool:
    """Whether the kernel of rms_norm takes rows of so many columns."""
    return device_type == "cuda" and dtype in (torch.float16, torch.bfloat16) and columns > 0 and columns % 8 == 0


def embedding_rows_supports(device_type: str, dtype: torch.dtype, rows: int, columns: int) -> bool:
    """Whether the kernel of embedding_rows takes such a table, and its few rows are worth it: PyTorch looks up many as
    fast."""
    fits = dtype in (torch.float16, torch.bfloat16) and columns > 0 and columns % 8 == 0
    return device_type == "cuda" and fits and 1 <= rows <= MAX_ROWS


def rope_angles_supports(device_type: str, dtype: torch.dtype) -> bool:
    """Whether the kernel of rope_angles makes angles of this dtype; on the CPU transformers' operations are as good."""
    return device_type == "cuda" and dtype in (torch.float16, torch.bfloat16, torch.float32)


def w8a16_variant(device_type: str, rows: int, reference: bool = False) -> W8A16Variant:
    """As :func:`w4a16_variant`, for int8."""
    if device_type == "cpu":
        return W8A16Variant.CPU_INT8PACK
    if reference:
        return W8A16Variant.REFERENCE
    return W8A16Variant.CUDA_KERNEL if rows <= MAX_ROWS else W8A16Variant.CUDA_DEQUANTIZE


def w4a16_variant(
    device_type: str, rows: int, reference: bool = False, capability: tuple[int, int] = (9, 0)
) -> W4A16Variant:
    """The variant for ``rows`` rows of activations on ``"cpu"`` or ``"cuda"``.

    On the CPU one library kernel serves every size. On CUDA our kernel reads each weight once for up to 16 rows; with
    more rows w4a16_gemm does, except where only its mma.sync form runs and the rows are so many that arithmetic is the
    limit: there cuBLAS is faster, though it wants the weight expanded.

    Args:
        reference: what a GPU runs that the kernels do not support.
        capability: compute capability of the GPU.
    """
    if device_type == "cpu":
        return W4A16Variant.CPU_INT4PACK
    if reference:
        return W4A16Variant.REFERENCE
    if rows <= MAX_ROWS:
        return W4A16Variant.CUDA_KERNEL
    return W4A16Variant.CUDA_GEMM if capability == (9, 0) or rows <= 64 else W4A16Variant.CUDA_DEQUANTIZE


def fuses_decoder_step(device_type: str) -> bool:
    """Whether decoder layers are run as steps, in few operations. The CPU's own products are faster than those."""
    return device_type == "cuda"


def w4a16_gemm_runs_on(variant: int, capability: tuple[int, int]) -> bool:
    """Whether a variant of w4a16_gemm runs on GPUs of this compute capability: whether they have its instructions."""
    return capability == (9, 0) if VARIANTS[variant].instruction == "wgmma" else capability >= (8, 0)


@functools.lru_cache(maxsize=4096)  # a prompt asks some times a layer
def w4a16_gemm_variant(
    rows: int, out_features: int, in_features: int, capability: tuple[int, int], sm_count: int
) -> int:
    """The variant of w4a16_gemm for ``(rows, in_features)`` times ``(out_features, in_features)``.

    The smallest tile that has all rows, or the largest, and K divided among the CTAs of a cluster where that makes the
    busiest multiprocessor's work less. tests/test_heuristics.py compares the choice with times of an H200.
    """
    forms = [i for i in range(len(VARIANTS)) if w4a16_gemm_runs_on(i, capability)]
    wgmma = [i for i in forms if VARIANTS[i].instruction == "wgmma"]
    forms = wgmma or forms
    sizes = {VARIANTS[i].tokens for i in forms}
    tokens = min((size for size in sizes if size >= rows), default=max(sizes))
    output_tiles = ceil_div(out_features, 128)
    if wgmma and tokens == 256 and output_tiles * ceil_div(rows, 256) <= sm_count // 4:
        tokens = 128
    tiles, units = output_tiles * ceil_div(rows, tokens), ceil_div(in_features, 128)
    fitting = [i for i in forms if VARIANTS[i].tokens == tokens]
    if not wgmma:
        return fitting[0]
    if tokens <= 64:
        return min(fitting, key=lambda i: _busiest_work(tiles, units, VARIANTS[i].splits, sm_count))
    worth = (i for i in fitting if _worth_dividing(VARIANTS[i].splits, tiles, units, sm_count))
    return max(worth, key=lambda i: VARIANTS[i].splits, default=fitting[0])


def w4a16_gemm_swiglu_has(variant: int) -> bool:
    """Whether w4a16_gemm_swiglu has a kernel of this variant of w4a16_gemm: those with wgmma that decoding takes."""
    form = VARIANTS[variant]
    return form.instruction == "wgmma" and form.tokens <= 64


def _busiest_work(tiles: int, units: int, splits: int, sm_count: int) -> int:
    """Units of 128 columns of K that the busiest multiprocessor multiplies, of tiles of up to 64 rows of x.

    It holds two CTAs, which share its speed, so that a second one pays only where clusters do not fit with a
    multiprocessor for each CTA. Of clusters fewer fit than CTAs would: all CTAs of one are in one part of the GPU, and
    the parts hold odd numbers of them. On an H200 31 clusters of 4 or 8 fit and 35 of 7: 0.95 of the places.
    """
    if splits == 1:
        return ceil_div(tiles, sm_count) * units
    each = ceil_div(units, splits)
    alone, together = (max(1, ctas * sm_count * 19 // (20 * splits)) for ctas in (1, 2))
    return each if tiles <= alone else 2 * ceil_div(tiles, together) * each


def _worth_dividing(splits: int, tiles: int, units: int, sm_count: int) -> bool:
    """Whether to divide K, of ``units`` of 128 columns, of ``tiles`` tiles of 128 rows of x or more."""
    # Clusters of 4 with a multiprocessor for each CTA do not fill a GPU: its parts hold odd numbers of them.
    return units // splits >= 4 and tiles * splits <= (sm_count if splits <= 2 else sm_count * 3 // 4)


def kv_append_supports(head_dim: int) -> bool:
    """Whether the CUDA kernels that append to a cache take this head size (the references take any)."""
    return head_dim % 8 == 0 and 8 <= head_dim <= 256


def rope_supports(rotary_dim: int) -> bool:
    """Whether they turn so many channels of a head by their position (the references turn any)."""
    return rotary_dim % 16 == 0


def short_conv_supports(taps: int) -> bool:
    """Whether the CUDA kernel of the short convolution takes so many taps (the reference takes any)."""
    return 2 <= taps <= 8


def attn_decode_supports(head_dim: int) -> bool:
    """Whether the CUDA kernels of decode attention take this head size (the CPU implementation takes any)."""
    return head_dim % 16 == 0 and 16 <= head_dim <= 256


def is_short_prompt(device_type: str, dtype: torch.dtype, tokens: int, head_dim: int) -> bool:
    """Whether rows of a prompt have so few ``tokens`` that flash attention is called by itself, which takes the host
    less time than cuDNN's, if the GPU more: of a layer of Llama-3.1-8B with 1024 tokens attention is 2% of the work."""
    fits = dtype in (torch.float16, torch.bfloat16) and head_dim % 8 == 0 and head_dim <= 256
    return device_type == "cuda" and fits and 1 < tokens <= SHORT_PROMPT_TOKENS


def attn_decode_int4_supports(head_dim: int) -> bool:
    """As :func:`attn_decode_supports`, for int4: the parts of a value that share a scale must be whole octets."""
    return attn_decode_supports(head_dim) and head_dim // value_groups(head_dim) % 8 == 0
