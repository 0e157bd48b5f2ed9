"""``silu(gate) * up`` of one product with the merged gate and up weight, W packed int4, for many rows of x."""

from __future__ import annotations

import torch

from hf_fastpath.ops import _library
from hf_fastpath.ops.swiglu import swiglu_reference
from hf_fastpath.ops.w4a16_gemm import w4a16_gemm_reference

SCHEMA = (
    "w4a16_gemm_swiglu(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias, int intermediate_size, "
    "int group_size, int variant) -> Tensor"
)


def w4a16_gemm_swiglu_reference(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    intermediate_size: int,
    group_size: int,
    variant: int,
) -> torch.Tensor:
    rows = 2 * intermediate_size
    return swiglu_reference(
        w4a16_gemm_reference(x, qweight, scales, zeros, bias, rows, group_size, variant, residual=None)
    )


def _fake(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    intermediate_size: int,
    group_size: int,
    variant: int,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], intermediate_size))


_op = _library.define(SCHEMA, w4a16_gemm_swiglu_reference, _fake)


def w4a16_gemm_swiglu(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    intermediate_size: int,
    group_size: int,
    variant: int,
) -> torch.Tensor:
    """``(M, I)`` in ``x.dtype``, I = ``intermediate_size``: ``silu(x @ gate.T) * (x @ up.T)`` (Shazeer, 2020).

    On the same GPU model the bits of :func:`~hf_fastpath.ops.swiglu` behind :func:`~hf_fastpath.ops.w4a16_gemm` of the
    same variant: gate, up, silu(gate) and the result are each rounded to ``x.dtype``, as separate modules do.

    Args:
        x, bias: as in w4a16_gemm, with N = 2 I.
        qweight, scales, zeros: one packed weight (:mod:`hf_fastpath.packing`) of 2 I rows: 0..I - 1 are the gate's,
            I..2 I - 1 up's. On CUDA as in w4a16_gemm, and I a multiple of 16.
        variant: one for which :func:`hf_fastpath.heuristics.w4a16_gemm_swiglu_has` is true. The CPU implementation has
            one form and ignores it.

    Raises RuntimeError, in words, for arguments that do not fit and for a variant that has no such kernel or that this
    GPU cannot run.
    """
    return _op(x, qweight, scales, zeros, bias, intermediate_size, group_size, variant)
