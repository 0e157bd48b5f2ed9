"""What the ops that append to a cache share: what becomes of queries and keys before a format stores the keys.

Between the projections and attention a model may normalize each head of its queries and keys (RMSNorm over the head,
Qwen3, LFM2) and turns them by their position (RoPE, Su et al., 2021, "RoFormer"); a cache may rotate them besides
(:mod:`hf_fastpath.ops._rotation`). Each step is rounded as transformers rounds it in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_fastpath.ops import _library
from hf_fastpath.ops._rms_norm import rms_norm
from hf_fastpath.ops._rotation import rotate

ARGUMENTS = (
    "Tensor? query, Tensor key, Tensor value, Tensor? q_norm, Tensor? k_norm, float eps, Tensor? cos, Tensor? sin, "
    "bool rotate, Tensor(z!)? query_out"
)


@dataclass(frozen=True)
class QKTransform:
    """What is done to queries and keys, in this order; the default is nothing.

    q_norm, k_norm: ``(D,)`` in the model's dtype, weights of an RMSNorm over each head with ``eps``, or None.

    cos, sin: ``(B or 1, q, D_rot)`` in the model's dtype, last dimension contiguous: RoPE of the first ``D_rot <= D``
    channels, which are turned in halves (transformers' ``rotate_half``), or None. On CUDA D_rot is a multiple of 16.

    rotate: whether the Hadamard rotation follows.
    """

    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    eps: float = 0.0
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    rotate: bool = False


NOTHING = QKTransform()
ROTATED = QKTransform(rotate=True)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x ``(B, H, q, D)`` turned, each product and the sum rounded, as transformers' ``apply_rotary_pos_emb``."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos.unsqueeze(1) + torch.cat([-second, first], dim=-1) * sin.unsqueeze(1)
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


def transformed(x: torch.Tensor, norm: torch.Tensor | None, transform: QKTransform) -> torch.Tensor:
    """Queries or keys x ``(B, H, q, D)``, ``norm`` being the weight for them, after all steps, in their dtype."""
    if norm is not None:
        x = rms_norm(x, norm, transform.eps)
    if transform.cos is not None and transform.sin is not None:
        x = rope(x, transform.cos, transform.sin)
    return rotate(x) if transform.rotate else x


def define(name: str, storage: str, store: Callable[..., None]) -> tuple[Any, Callable[..., None]]:
    """Defines the op of a format, whose schema ends with ``storage``; returns it and its reference.

    store: the reference that stores ``(key, value, *storage)``, keys as they are stored.
    """

    def reference(
        query: torch.Tensor | None,
        key: torch.Tensor,
        value: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
        cos: torch.Tensor | None,
        sin: torch.Tensor | None,
        rotate: bool,
        query_out: torch.Tensor | None,
        *stored: Any,
    ) -> None:
        transform = QKTransform(q_norm, k_norm, eps, cos, sin, rotate)
        if query is not None and query_out is not None:
            query_out.copy_(transformed(query, q_norm, transform))
        store(transformed(key, k_norm, transform), value, *stored)

    def fake(*arguments: Any) -> None:
        return None

    return _library.define(f"{name}({ARGUMENTS}, {storage}) -> ()", reference, fake), reference


def call(
    append: Any,
    key: torch.Tensor,
    value: torch.Tensor,
    storage: Sequence[Any],
    transform: QKTransform,
    query: torch.Tensor | None,
) -> torch.Tensor | None:
    """Calls an op that :func:`define` made, or its reference; returns the transformed query, ``(B, H, q, D)``, in
    memory token by token: attention kernels put out what they get, and that is the order that comes next."""
    out = None
    if query is not None:
        batch, heads, tokens, size = query.shape
        out = torch.empty((batch, tokens, heads, size), dtype=query.dtype, device=query.device).transpose(1, 2)
    t = transform
    append(query, key, value, t.q_norm, t.k_norm, t.eps, t.cos, t.sin, t.rotate, out, *storage)
    return out
