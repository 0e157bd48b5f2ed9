"""``silu(gate) * up`` of one product with the merged gate and up weight, W packed int4, for a few rows of x."""

from __future__ import annotations

import torch

from hf_fastpath.ops import _library
from hf_fastpath.ops.w4a16_linear_fused import normalized_product

SCHEMA = (
    "w4a16_swiglu(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias, Tensor? norm_weight, "
    "float eps, int intermediate_size, int group_size) -> Tensor"
)


def w4a16_swiglu_reference(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    intermediate_size: int,
    group_size: int,
) -> torch.Tensor:
    rows = 2 * intermediate_size
    both = normalized_product(x, qweight, scales, zeros, bias, norm_weight, eps, rows, group_size).to(x.dtype)
    gate, up = both.split(intermediate_size, dim=-1)
    return torch.nn.functional.silu(gate) * up


def _fake(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    intermediate_size: int,
    group_size: int,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], intermediate_size))


_op = _library.define(SCHEMA, w4a16_swiglu_reference, _fake)


def w4a16_swiglu(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    intermediate_size: int,
    group_size: int,
) -> torch.Tensor:
    """``(M, I)`` in ``x.dtype``, I = ``intermediate_size``: ``silu(x' @ gate.T) * (x' @ up.T)`` (Shazeer, 2020).

    Args:
        x, norm_weight, eps: as in :func:`~hf_fastpath.ops.w4a16_linear_fused`; x' is x or its RMSNorm.
        qweight, scales, zeros: one packed weight (:mod:`hf_fastpath.packing`) of 2 I rows: 0..I - 1 are the gate's,
            I..2 I - 1 up's. On CUDA I is a multiple of 16.
        bias: ``(2 I,)`` in ``x.dtype`` or None.

    gate, up, silu(gate) and the result are each rounded to ``x.dtype``, as separate modules do. A row's result has the
    same bits for every M, but for one row alone: see :func:`w4a16_linear`.
    """
    return _op(x, qweight, scales, zeros, bias, norm_weight, eps, intermediate_size, group_size)
