"""``silu(gate) * up`` of one product with gate's and up's rows in one plain 16-bit weight, for a few rows of x."""

from __future__ import annotations

import torch

from hf_fastpath.ops import _library
from hf_fastpath.ops.linear_16bit import normalized_product

SCHEMA = "linear_16bit_swiglu(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, float eps) -> Tensor"


def linear_16bit_swiglu_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, norm_weight: torch.Tensor | None, eps: float
) -> torch.Tensor:
    gate, up = normalized_product(x, weight, bias, norm_weight, eps).to(x.dtype).chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def _fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, norm_weight: torch.Tensor | None, eps: float
) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0] // 2))


_op = _library.define(SCHEMA, linear_16bit_swiglu_reference, _fake)


def linear_16bit_swiglu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, norm_weight: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """``(M, I)`` in ``x.dtype``: ``silu(x' @ gate.T) * (x' @ up.T)`` (Shazeer, 2020).

    Args:
        x, norm_weight, eps: as in :func:`~hf_fastpath.ops.linear_16bit`; x' is x or its RMSNorm.
        weight: ``(2 I, K)`` as there: rows 0..I - 1 are the gate's, I..2 I - 1 up's. On CUDA I is a multiple of 16.
        bias: ``(2 I,)`` in ``x.dtype`` or None.

    gate, up, silu(gate) and the result are each rounded to ``x.dtype``, as separate modules do. A row's result has the
    same bits for every M.
    """
    return _op(x, weight, bias, norm_weight, eps)
