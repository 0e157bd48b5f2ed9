"""``y = x @ W.T + bias`` for a few rows of x, W packed int4 (the decode step's product)."""

from __future__ import annotations

import torch

from hf_fastpath import packing
from hf_fastpath.ops import _library

MAX_ROWS = 16  # rows the CUDA kernel takes; more rows are faster through w4a16_dequantize and cuBLAS

SCHEMA = (
    "w4a16_linear(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias, int out_features, "
    "int group_size) -> Tensor"
)


def w4a16_linear_reference(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
    group_size: int,
) -> torch.Tensor:
    """The same product in float32, rounded once to ``x.dtype``."""
    w = packing.dequantize(qweight, scales, zeros, x.shape[1], out_features, group_size).float()
    return torch.nn.functional.linear(x.float(), w, None if bias is None else bias.float()).to(x.dtype)


def _fake(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
    group_size: int,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], out_features))


_op = _library.define(SCHEMA, w4a16_linear_reference, _fake)


def w4a16_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
    group_size: int,
    *,
    reference: bool = False,
) -> torch.Tensor:
    """``(M, K)`` times packed ``(N, K)`` transposed: ``(M, N)`` in ``x.dtype``, accumulated in float32.

    Args:
        x: ``(M, K)``, last dimension contiguous, any row stride. On CUDA: M in 1..16, the dtype of ``scales``.
        qweight, scales, zeros: see :mod:`hf_fastpath.packing`.
        bias: ``(N,)`` in ``x.dtype`` or None.
        reference: run the reference implementation, on any device, for any M.

    A row's result has the same bits for every M from 2 on, and for every M where K is no multiple of 128; otherwise one
    row alone is multiplied by integer tensor cores, x as 22-bit integers times a factor for 128 columns.
    """
    run = w4a16_linear_reference if reference else _op
    return run(x, qweight, scales, zeros, bias, out_features, group_size)
