"""A decoder layer of LFM2's kind with a gated short convolution in few operations. For one new token in each of up to
16 rows, on int4 weights, four:

norm, first projection and convolution | second projection and residual |
norm, gate, up and SwiGLU | down and residual.

Each is a kernel; with more than four rows a norm is one of its own. Otherwise as in
:mod:`hf_fastpath.modules.decoder_step`, the convolution apart from its projection too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from hf_fastpath.heuristics import short_conv_supports
from hf_fastpath.modules.decoder_step import FeedForwardParts, LayerStep, why_not_feed_forward
from hf_fastpath.modules.merged import Int4Weight, Norm, merge
from hf_fastpath.ops import short_conv_prefill, short_conv_step, w4a16_short_conv


class ConvParts(NamedTuple):
    """What a layer consists of. weight: of the convolution, ``(H, 1, L)``; feed_forward: None for one that the caller
    runs itself."""

    in_proj: Any
    out_proj: Any
    weight: torch.Tensor
    bias: torch.Tensor | None
    norm: Norm
    feed_forward: FeedForwardParts | None

    def why_not(self) -> str:
        """Why :class:`ConvStep` does not take it; "" when it does."""
        others = [self.weight, *([] if self.bias is None else [self.bias])]
        if reason := why_not_feed_forward([[self.in_proj], [self.out_proj]], [self.norm], others, self.feed_forward):
            return reason
        channels, _, taps = self.weight.shape
        if not short_conv_supports(taps):
            return f"its convolution has {taps} taps"
        return "its channels are not a multiple of 16" if channels % 16 else ""


class ConvStep(LayerStep):
    """The step of one layer. Its roundings are those of transformers' modules, but that where products are fused a
    product and the residual that it is added to are rounded together, once; so are the last product and its residual
    where weights are in 16 bits.

    Args:
        parts: of the layer, such that ``why_not()`` has nothing against them.
    """

    def __init__(self, parts: ConvParts) -> None:
        self.parts = parts
        self.in_proj = merge([parts.in_proj])
        super().__init__([parts.in_proj, parts.out_proj], parts.out_proj, parts.feed_forward)
        self.state_shape = parts.weight.shape[0], parts.weight.shape[2]  # of a row

    def __call__(self, x: torch.Tensor, state: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The layer's output for one new token a row, x ``(M, hidden_size)``, alike.

        Args:
            state: ``(M, H, L)``, moved on by one token in place.
            mask: bool ``(M,)``, False for a row whose token is padding; None: none is.
        """
        p, w = self.parts, self.in_proj
        conv = (state, p.weight.squeeze(1), p.bias, mask)
        if isinstance(w, Int4Weight) and w.fuses(x.shape[0]):
            packed = (w.qweight, w.scales, w.zeros, w.bias)
            return self.finish(x, w4a16_short_conv(x, *packed, p.norm.weight, p.norm.eps, *conv, w.group_size))
        return self.finish(x, short_conv_step(w.product(x, p.norm, None), *conv))

    def prompt(self, x: torch.Tensor, state: torch.Tensor, mask: torch.Tensor | None, in_kernel: bool) -> torch.Tensor:
        """The layer's output for some new tokens a row, x ``(B, T, hidden_size)``, alike.

        Args:
            state: ``(B, H, L)`` in x's dtype, moved on by the tokens in place.
            mask: bool ``(B, T)``, False for padding; None: there is none.
            in_kernel: whether our ops take the state; else their references run.
        """
        p, rows = self.parts, x.reshape(-1, x.shape[2])
        bcx = self.in_proj.product(rows, p.norm, None).view(*x.shape[:2], -1)
        convolved = short_conv_prefill(bcx, state, p.weight.squeeze(1), p.bias, mask, reference=not in_kernel)
        return self.finish(rows, convolved.view(rows.shape)).view(x.shape)
