"""A decoder layer of Llama's kind for one new token a row, in six operations:

norm, query, key and value | the heads' norms, RoPE, rotation, quantization, append | attention over the cache |
output and residual | norm, gate, up and SwiGLU | down and residual.

Each is a kernel; with more than four rows a norm is one of its own, and attention over a long cache is two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from hf_fastpath.modules.merged import MergedWeight, merge, why_not_merged
from hf_fastpath.modules.w4a16_linear import W4A16Linear
from hf_fastpath.ops import QKTransform, w4a16_linear_fused, w4a16_swiglu


class StepCache(Protocol):
    """What a step wants of a cache's layer: see :class:`hf_fastpath.caches.compressed.CompressedLayer`."""

    rotate_keys: bool

    def step(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        transform: QKTransform,
        mask: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor: ...


class Norm(NamedTuple):
    """An RMSNorm."""

    weight: torch.Tensor
    eps: float


class FeedForwardParts(NamedTuple):
    """What a layer's feed-forward consists of, the norm before it included."""

    gate_up: Sequence[W4A16Linear]
    down: W4A16Linear
    norm: Norm


def why_not_fused(
    groups: Sequence[Sequence[W4A16Linear]], norms: Sequence[Norm], others: Sequence[torch.Tensor] = ()
) -> str:
    """Why linear layers, those of one input together, norms and other weights are not run by the fused products; ""
    when they are."""
    reasons = [reason for group in groups if (reason := why_not_merged(group))]
    if reasons:
        return reasons[0]
    if any(layer.reference for group in groups for layer in group):
        return "the reference implementations run it"
    dtypes = {norm.weight.dtype for norm in norms} | {weight.dtype for weight in others}
    if norms[0].weight.dtype is not torch.float32:  # which only the references take, with any scales
        dtypes |= {layer.scales.dtype for group in groups for layer in group}
    return "its parts differ in dtype" if len(dtypes) > 1 else ""


class DecoderParts(NamedTuple):
    """What a layer consists of: its linear layers, those of one input together, and its norms. feed_forward: None for
    one that the caller runs itself."""

    qkv: Sequence[W4A16Linear]
    out: W4A16Linear
    feed_forward: FeedForwardParts | None
    input_norm: Norm
    q_norm: Norm | None
    k_norm: Norm | None
    head_dim: int
    scaling: float

    def why_not(self) -> str:
        """Why :class:`DecoderStep` does not take it; "" when it does."""
        groups, norms = [self.qkv, [self.out]], [self.input_norm, *filter(None, (self.q_norm, self.k_norm))]
        if reason := why_not_feed_forward(groups, norms, (), self.feed_forward):
            return reason
        if self.q_norm and self.k_norm and self.q_norm.eps != self.k_norm.eps:
            return "the norms of its queries and keys differ in eps"
        return ""


def why_not_feed_forward(
    groups: list[Sequence[W4A16Linear]],
    norms: list[Norm],
    others: Sequence[torch.Tensor],
    feed_forward: FeedForwardParts | None,
) -> str:
    """:func:`why_not_fused` of a layer's first half, together with its feed-forward where there is one."""
    if feed_forward is not None:
        groups = [*groups, feed_forward.gate_up, [feed_forward.down]]
        norms = [*norms, feed_forward.norm]
    if reason := why_not_fused(groups, norms, others):
        return reason
    if feed_forward is not None and feed_forward.gate_up[0].out_features % 16:
        return "its feed-forward's size is not a multiple of 16"
    return ""


class FeedForwardStep:
    """The residual stream behind a feed-forward, in two kernels: norm, gate, up and SwiGLU | down and residual.

    Args:
        parts: None: it is left as it is.
    """

    def __init__(self, parts: FeedForwardParts | None) -> None:
        self.parts = parts
        if parts is not None:
            self.gate_up, self.down = merge(parts.gate_up), merge([parts.down])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x ``(M, hidden_size)`` to the same."""
        if self.parts is None:
            return x
        norm, w, rows = self.parts.norm, self.gate_up, self.parts.gate_up[0].out_features
        y = w4a16_swiglu(x, w.qweight, w.scales, w.zeros, w.bias, norm.weight, norm.eps, rows, w.group_size)
        return product(y, self.down, None, x)


class DecoderStep:
    """The step of one layer.

    Its roundings are those of transformers' modules but for two: a product and the residual, or the bias, that it is
    added to are rounded together, once; and the query is rotated in float32 for a cache that holds rotated keys.

    Args:
        parts: of the layer, such that ``why_not()`` has nothing against them. The linear layers' tensors become views
            of merged ones.
    """

    def __init__(self, parts: DecoderParts) -> None:
        self.parts = parts
        self.qkv, self.out = merge(parts.qkv), merge([parts.out])
        self.feed_forward = FeedForwardStep(parts.feed_forward)
        self.heads = [layer.out_features // parts.head_dim for layer in parts.qkv]

    def __call__(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache_layer: StepCache, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """The layer's output for x ``(M, hidden_size)``, alike; M is at most ``ops.w4a16_linear.MAX_ROWS``.

        Args:
            cos, sin: ``(M or 1, 1, D_rot)`` in x's dtype.
            cache_layer: the token of each row is appended to it, and attends to what it then holds.
            mask: bool ``(M, >= tokens)``, True where a token may be attended; None: all may.
        """
        p, rows = self.parts, x.shape[0]
        heads = product(x, self.qkv, p.input_norm, None).view(rows, -1, 1, p.head_dim)
        q, k, v = heads.split(self.heads, dim=1)
        transform = QKTransform(
            p.q_norm.weight if p.q_norm else None,
            p.k_norm.weight if p.k_norm else None,
            p.q_norm.eps if p.q_norm else 0.0,
            *(cos, sin, cache_layer.rotate_keys),
        )
        attended = cache_layer.step(q, k, v, transform, mask, p.scaling)
        return self.feed_forward(product(attended.view(rows, -1), self.out, None, x))


def product(x: torch.Tensor, w: MergedWeight, norm: Norm | None, residual: torch.Tensor | None) -> torch.Tensor:
    """One fused product: ``residual + RMSNorm(x) @ W.T + bias``."""
    weight, eps = norm or (None, 0.0)
    return w4a16_linear_fused(
        x, w.qweight, w.scales, w.zeros, w.bias, weight, eps, residual, w.out_features, w.group_size
    )
