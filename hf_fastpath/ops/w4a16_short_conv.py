"""A step of LFM2's gated short convolution on its first projection, packed int4, and the norm before it."""

from __future__ import annotations

import torch

from hf_fastpath.ops import _library
from hf_fastpath.ops.short_conv_step import short_conv_step_reference
from hf_fastpath.ops.w4a16_linear_fused import normalized_product

SCHEMA = (
    "w4a16_short_conv(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias, Tensor norm_weight, "
    "float eps, Tensor(a!) state, Tensor conv_weight, Tensor? conv_bias, Tensor? mask, int group_size) -> Tensor"
)


def w4a16_short_conv_reference(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor,
    eps: float,
    state: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    rows = 3 * conv_weight.shape[0]
    bcx = normalized_product(x, qweight, scales, zeros, bias, norm_weight, eps, rows, group_size).to(x.dtype)
    return short_conv_step_reference(bcx, state, conv_weight, conv_bias, mask)


def _fake(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor,
    eps: float,
    state: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], conv_weight.shape[0]))


_op = _library.define(SCHEMA, w4a16_short_conv_reference, _fake)


def w4a16_short_conv(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor,
    eps: float,
    state: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    """``(M, H)`` in ``x.dtype``: :func:`~hf_fastpath.ops.short_conv_step` of RMSNorm(x) times a packed weight.

    Args:
        x, norm_weight, eps: as in :func:`~hf_fastpath.ops.w4a16_linear_fused`; a row is one new token of a sequence.
        qweight, scales, zeros: one packed weight (:mod:`hf_fastpath.packing`) of 3 H rows, B's, C's and x's.
        bias: ``(3 H,)`` in ``x.dtype`` or None.
        state: ``(M, H, L)`` in ``x.dtype``, contiguous, moved on by one token in place; that of a masked row stays.
        conv_weight: ``(H, L)``, conv_bias: ``(H,)`` or None, both in ``x.dtype`` and contiguous. On CUDA H is a
            multiple of 16, and L is 2 to 8.
        mask: bool ``(M,)``, False for a row whose token is padding, or None.

    Every rounding is that of the separate operations, and a row's result has the same bits for every M, but for one row
    alone: see :func:`w4a16_linear`.
    """
    return _op(x, qweight, scales, zeros, bias, norm_weight, eps, state, conv_weight, conv_bias, mask, group_size)
