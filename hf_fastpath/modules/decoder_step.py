"""A decoder layer of Llama's kind in few operations. For one new token in each of up to 16 rows, on int4 weights, five:

norm, query, key and value | the heads' norms, RoPE, rotation, quantization, append, attention over the cache |
output and residual | norm, gate, up and SwiGLU | down and residual.

Over the caches fp8, int4 and h2o attention is apart from what is before it. Each is a kernel; with more than four rows
a norm is one of its own. For more rows, and for weights in 16 bits, norms and residuals are apart from the products,
the first residual being one with the second norm, and so is SwiGLU but for int4 products of up to 64 rows on compute
capability 9.0. Prompts run so too, but for attention, which is what the cache and transformers make of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from hf_fastpath.modules.merged import MergedWeight, Norm, merge, places, separate, why_not_merged
from hf_fastpath.modules.w4a16_linear import W4A16Linear
from hf_fastpath.ops import QKTransform, add_rms_norm, kv_static_append


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


# Linear layers, packed (W4A16Linear) or plain.
Layers = Sequence[Any]
# Attention of the new tokens: queries (B, H, T, D), keys and values (B, H_kv, T, D), in the model's dtype, to
# (B, T, H, D).
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class FeedForwardParts(NamedTuple):
    """What a layer's feed-forward consists of, the norm before it included."""

    gate_up: Layers
    down: Any
    norm: Norm


def why_not_fused(groups: Sequence[Layers], norms: Sequence[Norm], others: Sequence[torch.Tensor] = ()) -> str:
    """Why linear layers, those of one input together, norms and other weights are not run as a step; "" when they
    are."""
    reasons = [reason for group in groups if (reason := why_not_merged(group))]
    if reasons:
        return reasons[0]
    layers = [layer for group in groups for layer in group]
    int4 = [layer for layer in layers if isinstance(layer, W4A16Linear)]
    if any(layer.reference for layer in int4):
        return "the reference implementations run it"
    dtypes = {norm.weight.dtype for norm in norms} | {weight.dtype for weight in others}
    dtypes |= {layer.weight.dtype for layer in layers if not isinstance(layer, W4A16Linear)}
    if norms[0].weight.dtype is not torch.float32:  # which only the references take, with any scales
        dtypes |= {layer.scales.dtype for layer in int4}
    return "its parts differ in dtype" if len(dtypes) > 1 else ""


class DecoderParts(NamedTuple):
    """What a layer consists of: its linear layers, those of one input together, and its norms. feed_forward: None for
    one that the caller runs itself."""

    qkv: Layers
    out: Any
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
    groups: list[Layers],
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


class LayerStep:
    """What the steps of layers with attention and with a convolution share: their ends.

    Args:
        layers: all linear layers, merged or not.
    """

    def __init__(self, layers: Layers, out: Any, feed_forward: FeedForwardParts | None) -> None:
        self.out, self.norm = merge([out]), None
        self._layers = list(layers)
        if feed_forward is not None:
            self.gate_up, self.down = merge(feed_forward.gate_up), merge([feed_forward.down])
            self.norm = feed_forward.norm
            self._layers += [*feed_forward.gate_up, feed_forward.down]
        self._places = places(self._layers)

    @property
    def moved(self) -> bool:
        """Whether weights in 16 bits are no longer where they were merged."""
        return any(parameter.data_ptr() != place for parameter, place in self._places)

    def keeps_row_bits(self, rows: int) -> bool:
        """Whether all products of up to ``rows`` rows are our kernels', as everything else of a step is: see
        :func:`hf_fastpath.spare_rows.keeps_row_bits`."""
        return all(weight.fuses(rows) for weight in vars(self).values() if isinstance(weight, MergedWeight))

    def release(self) -> None:
        """Gives plain layers memory of their own again; packed ones stay views of what they were merged into."""
        separate(self._layers)

    def finish(self, x: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
        """The layer's output for the residual stream x ``(M, hidden_size)`` and what the layer's first half leaves to
        its last product."""
        if self.norm is None:
            return self.out.product(inner, None, x)
        if not (self.out.fuses(x.shape[0]) and self.gate_up.fuses(x.shape[0])):
            return self.add(x, self.out.multiply(inner))
        x = self.out.product(inner, None, x)
        return self.down.add_to(x, self.gate_up.swiglu(x, self.norm))

    def add(self, x: torch.Tensor, first_half: torch.Tensor) -> torch.Tensor:
        """The same of a layer with a feed-forward, where the first half's product is there."""
        assert self.norm is not None
        x, normalized = add_rms_norm(first_half, x, *self.norm)
        return self.down.add_to(x, self.gate_up.swiglu(normalized, None))


class DecoderStep(LayerStep):
    """The step of one layer.

    Its roundings are those of transformers' modules but for these: where products are fused a product and the residual,
    or the bias, that it is added to are rounded together, once; so are the last product and its residual for any number
    of rows; and the query of one new token is rotated in float32 for a cache that holds rotated keys.

    Args:
        parts: of the layer, such that ``why_not()`` has nothing against them. The linear layers' tensors become views
            of merged ones.
    """

    def __init__(self, parts: DecoderParts) -> None:
        self.parts = parts
        self.qkv = merge(parts.qkv)
        super().__init__([*parts.qkv, parts.out], parts.out, parts.feed_forward)
        self.heads = [layer.out_features // parts.head_dim for layer in parts.qkv]

    def __call__(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache_layer: StepCache, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """The layer's output for one new token a row, x ``(M, hidden_size)``, alike.

        Args:
            cos, sin: ``(M or 1, 1, D_rot)`` in x's dtype.
            cache_layer: the token of each row is appended to it, and attends to what it then holds.
            mask: bool ``(M, >= tokens)``, True where a token may be attended; None: all may.
        """
        q, k, v = self._heads(x.unsqueeze(1))
        transform = self._transform(cos, sin, cache_layer.rotate_keys)
        attended = cache_layer.step(q, k, v, transform, mask, self.parts.scaling)
        return self.finish(x, attended.view(x.shape[0], -1))

    def prompt(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend) -> torch.Tensor:
        """The layer's output for some new tokens a row, x ``(B, T, hidden_size)``, alike.

        Args:
            cos, sin: ``(B or 1, T, D_rot)`` in x's dtype.
            attend: stores the keys and values, normalized and turned as the queries are, and attends to them.
        """
        x = x.contiguous()
        q, k, v = self._heads(x)
        keys, values = (torch.empty(part.shape, dtype=x.dtype, device=x.device) for part in (k, v))
        transform = self._transform(cos, sin, False)
        turned = kv_static_append(k, v, (keys, values, None), transform, q)
        assert turned is not None
        rows = x.view(-1, x.shape[2])
        return self.finish(rows, attend(turned, keys, values).reshape(rows.shape[0], -1)).view(x.shape)

    def _heads(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values ``(B, heads, T, D)`` of x ``(B, T, hidden_size)``, as the projections leave them."""
        heads = self.qkv.product(x.view(-1, x.shape[2]), self.parts.input_norm, None)
        return heads.view(*x.shape[:2], -1, self.parts.head_dim).transpose(1, 2).split(self.heads, dim=1)

    def _transform(self, cos: torch.Tensor, sin: torch.Tensor, rotate: bool) -> QKTransform:
        q_norm, k_norm = self.parts.q_norm, self.parts.k_norm
        weights = q_norm.weight if q_norm else None, k_norm.weight if k_norm else None
        return QKTransform(*weights, q_norm.eps if q_norm else 0.0, cos, sin, rotate)
