"""A decoder layer of LFM2's kind with a gated short convolution, for one new token a row, in four operations:

norm, first projection and convolution | second projection and residual |
norm, gate, up and SwiGLU | down and residual.

Each is a kernel; with more than four rows a norm is one of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from hf_fastpath.heuristics import short_conv_supports
from hf_fastpath.modules.decoder_step import FeedForwardParts, FeedForwardStep, Norm, product, why_not_feed_forward
from hf_fastpath.modules.merged import merge
from hf_fastpath.modules.w4a16_linear import W4A16Linear
from hf_fastpath.ops import w4a16_short_conv


class ConvParts(NamedTuple):
    """What a layer consists of. weight: of the convolution, ``(H, 1, L)``; feed_forward: None for one that the caller
    runs itself."""

    in_proj: W4A16Linear
    out_proj: W4A16Linear
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


class ConvStep:
    """The step of one layer. Its roundings are those of transformers' modules, but that a product and the residual that
    it is added to are rounded together, once.

    Args:
        parts: of the layer, such that ``why_not()`` has nothing against them.
    """

    def __init__(self, parts: ConvParts) -> None:
        self.parts = parts
        self.in_proj, self.out_proj = merge([parts.in_proj]), merge([parts.out_proj])
        self.feed_forward = FeedForwardStep(parts.feed_forward)
        self.state_shape = parts.weight.shape[0], parts.weight.shape[2]  # of a row

    def __call__(self, x: torch.Tensor, state: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The layer's output for x ``(M, hidden_size)``, alike; M is at most ``ops.w4a16_linear.MAX_ROWS``.

        Args:
            state: ``(M, H, L)``, moved on by one token in place.
            mask: bool ``(M,)``, False for a row whose token is padding; None: none is.
        """
        p, w = self.parts, self.in_proj
        y = w4a16_short_conv(
            x,
            w.qweight,
            w.scales,
            w.zeros,
            w.bias,
            p.norm.weight,
            p.norm.eps,
            state,
            p.weight.squeeze(1),
            p.bias,
            mask,
            w.group_size,
        )
        return self.feed_forward(product(y, self.out_proj, None, x))
