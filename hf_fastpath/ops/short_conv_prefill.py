"""LFM2's gated short convolution over new tokens: ``C * conv(B * x)``, and the state that the next ones need."""

from __future__ import annotations

import torch

from hf_fastpath.ops import _library

SCHEMA = "short_conv_prefill(Tensor bcx, Tensor(a!) state, Tensor weight, Tensor? bias, Tensor? mask) -> Tensor"


def short_conv_prefill_reference(
    bcx: torch.Tensor, state: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, mask: torch.Tensor | None
) -> torch.Tensor:
    gate_in, gate_out, x = bcx.transpose(1, 2).chunk(3, dim=1)
    gated, tokens, taps = gate_in * x, bcx.shape[1], state.shape[2]
    if mask is not None:
        gated = torch.where(mask.unsqueeze(1), gated, 0)
    inputs = torch.cat((state, gated), dim=2)
    out = torch.nn.functional.conv1d(inputs, weight.unsqueeze(1), bias, groups=weight.shape[0])
    if mask is None:
        state.copy_(inputs[:, :, tokens:])
    else:
        positions = torch.arange(1, tokens + 1, device=mask.device)
        end = (mask * positions).amax(dim=1)  # tokens up to a row's last real one
        kept = end[:, None, None] + torch.arange(taps, device=mask.device)
        state.copy_(inputs.gather(2, kept.expand(-1, state.shape[1], -1)))
    return (gate_out * out[:, :, -tokens:]).transpose(1, 2).contiguous()


def _fake(
    bcx: torch.Tensor, state: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, mask: torch.Tensor | None
) -> torch.Tensor:
    return bcx.new_empty((bcx.shape[0], bcx.shape[1], weight.shape[0]))


_op = _library.define(SCHEMA, short_conv_prefill_reference, _fake)


def short_conv_prefill(
    bcx: torch.Tensor,
    state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    *,
    reference: bool = False,
) -> torch.Tensor:
    """``(batch, T, H)`` in ``bcx.dtype``: ``C * conv(B * x)``, the depthwise convolution going on from ``state``.

    The operator of LFM2 (Liquid AI, 2025) between its two projections: out[t] is C[t] times the sum over l of
    weight[l] (B x)[t - L + 1 + l], plus the bias. A token that is masked counts as 0 whatever it holds.

    Args:
        bcx: ``(batch, T, 3 H)``, T >= 1: B, C and x of each token, what ``in_proj`` puts out.
        state: ``(batch, H, L)`` in ``bcx.dtype``: ``B x`` of the L tokens before, zeros where there was none. Changed
            in place to those up to each row's last token that is not masked: padding on either side never gets in.
        weight: ``(H, L)``, bias: ``(H,)`` or None, in ``bcx.dtype``.
        mask: bool ``(batch, T)``, False for padding; None: no token is.
        reference: run the reference implementation, on any device. On CUDA the kernel takes 2 to 8 taps L, state,
            weight and bias contiguous, and bcx contiguous in its last dimension.

    B x, the convolution and the result are each rounded to ``bcx.dtype``, as separate operations do.
    """
    run = short_conv_prefill_reference if reference else _op
    return run(bcx, state, weight, bias, mask)
