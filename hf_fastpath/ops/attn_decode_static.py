"""Attention of one new token a row over keys and values as the model has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hf_fastpath.ops import _library
from hf_fastpath.ops._attention import Expanded, decode, in_tiles

SCHEMA = (
    "attn_decode_static(Tensor query, Tensor k, Tensor v, Tensor lengths, Tensor(a!)? tickets, Tensor? mask, float "
    "scaling, int window, float softcap, Tensor? sinks) -> Tensor"
)


def _expand(length: int, k: torch.Tensor, v: torch.Tensor) -> Expanded:
    return Expanded(in_tiles(k, length), in_tiles(v, length))


def attn_decode_static_reference(
    query: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    tickets: torch.Tensor | None,
    mask: torch.Tensor | None,
    scaling: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Computed in float32; keys and values are expanded tile by tile."""
    storage = (k, v, lengths)
    return decode(_expand, query, storage, mask, scaling, window, softcap, sinks)


def _fake(
    query: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    tickets: torch.Tensor | None,
    mask: torch.Tensor | None,
    scaling: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    return query.new_empty(query.shape)


_op = _library.define(SCHEMA, attn_decode_static_reference, _fake)


def attn_decode_static(
    query: torch.Tensor,
    storage: Sequence[torch.Tensor],
    mask: torch.Tensor | None,
    scaling: float,
    *,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    tickets: torch.Tensor | None = None,
    reference: bool = False,
) -> torch.Tensor:
    """``softmax(scaling * q K^T) V`` over the tokens that are stored, ``(B, H, D)`` in ``query.dtype``.

    Args:
        query: ``(B, H, D)`` contiguous; fp16, bf16 (CPU also fp32). H is a multiple of H_kv; head h reads KV head
            ``h // (H / H_kv)``. On CUDA D is a multiple of 16 up to 256.
        storage: that of :class:`hf_fastpath.caches.static.StaticKVLayer`, which describes it, of query's dtype. On CUDA
            the capacity is a multiple of 16.
        mask, scaling, window, softcap, sinks, tickets, reference: see :func:`attn_decode_int8`, as for what is
            deterministic.
    """
    attend: Any = attn_decode_static_reference if reference else _op
    return attend(query, *storage, tickets, mask, scaling, window, softcap, sinks)
