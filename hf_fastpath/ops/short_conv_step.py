"""LFM2's gated short convolution over one new token a row: the decode step."""

from __future__ import annotations

import torch

from hf_fastpath.ops import _library
from hf_fastpath.ops.short_conv_prefill import short_conv_prefill_reference

SCHEMA = "short_conv_step(Tensor bcx, Tensor(a!) state, Tensor weight, Tensor? bias, Tensor? mask) -> Tensor"


def short_conv_step_reference(
    bcx: torch.Tensor, state: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, mask: torch.Tensor | None
) -> torch.Tensor:
    mask = None if mask is None else mask.unsqueeze(1)
    return short_conv_prefill_reference(bcx.unsqueeze(1), state, weight, bias, mask).squeeze(1)


def _fake(
    bcx: torch.Tensor, state: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, mask: torch.Tensor | None
) -> torch.Tensor:
    return bcx.new_empty((bcx.shape[0], weight.shape[0]))


_op = _library.define(SCHEMA, short_conv_step_reference, _fake)


def short_conv_step(
    bcx: torch.Tensor,
    state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    *,
    reference: bool = False,
) -> torch.Tensor:
    """``(batch, H)`` in ``bcx.dtype``: :func:`~hf_fastpath.ops.short_conv_prefill` for one token a row.

    Args:
        bcx: ``(batch, 3 H)``.
        state: ``(batch, H, L)``, moved on by one token in place; that of a masked row stays.
        mask: bool ``(batch,)`` or None. weight, bias, reference: as there.
    """
    run = short_conv_step_reference if reference else _op
    return run(bcx, state, weight, bias, mask)
