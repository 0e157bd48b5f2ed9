"""Attention of one new token a row over the H2O cache, which also counts how much of it each slot gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hf_fastpath.ops import _library
from hf_fastpath.ops._attention import attention_weights, tiles, weighted_sum
from hf_fastpath.ops._slots import Slots, count_padding

SCHEMA = (
    "attn_decode_h2o(Tensor query, Tensor k_data, Tensor k_scale, Tensor v_data, Tensor v_scale, Tensor(a!) scores, "
    "Tensor positions, Tensor(b!) counts, Tensor(c!)? tickets, Tensor? mask, float scaling) -> Tensor"
)


def attn_decode_h2o_reference(
    query: torch.Tensor,
    k_data: torch.Tensor,
    k_scale: torch.Tensor,
    v_data: torch.Tensor,
    v_scale: torch.Tensor,
    scores: torch.Tensor,
    positions: torch.Tensor,
    counts: torch.Tensor,
    tickets: torch.Tensor | None,
    mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Computed in float32, expanded tile by tile."""
    slots = Slots(k_data, k_scale, v_data, v_scale, scores, positions, counts)
    used, kv_heads = slots.used(slots.seen), k_data.shape[1]
    parts = tiles(used)
    visible = None
    if mask is not None:
        visible = mask.unsqueeze(1).expand(-1, kv_heads, -1).gather(2, positions[:, :, :used].long()).unsqueeze(2)
        count_padding(counts, mask[:, slots.seen - 1 : slots.seen], slots.seen - 1)
    keys = (k_data[:, :, tile].float() for tile in parts)
    values = (v_data[:, :, tile].float() for tile in parts)
    weights = attention_weights(query, kv_heads, keys, visible, scaling, k_scale[:, :, :used].float())
    gained = weights.sum(2)
    if mask is not None:
        gained *= mask[:, None, slots.seen - 1 : slots.seen]  # what padding attends to says nothing
    scores[:, :, :used] += gained
    return weighted_sum(weights, values, query, v_scale[:, :, :used].float())


def _fake(
    query: torch.Tensor,
    k_data: torch.Tensor,
    k_scale: torch.Tensor,
    v_data: torch.Tensor,
    v_scale: torch.Tensor,
    scores: torch.Tensor,
    positions: torch.Tensor,
    counts: torch.Tensor,
    tickets: torch.Tensor | None,
    mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    return query.new_empty(query.shape)


_op = _library.define(SCHEMA, attn_decode_h2o_reference, _fake)


def attn_decode_h2o(
    query: torch.Tensor,
    storage: Sequence[torch.Tensor],
    mask: torch.Tensor | None,
    scaling: float,
    *,
    tickets: torch.Tensor | None = None,
    reference: bool = False,
) -> torch.Tensor:
    """``softmax(scaling * q K^T) V`` over the slots in use, ``(B, H, D)`` in ``query.dtype``.

    To each slot's ``scores`` its weight is added, summed over the query heads that read the KV head.

    Args:
        query: ``(B, H, D)`` contiguous, that of the token appended last; fp16, bf16 (CPU also fp32). H is a multiple
            of H_kv; head h reads KV head ``h // (H / H_kv)``.
        storage: that of :class:`hf_fastpath.caches.h2o.H2OKVLayer`, which describes it.
        mask: bool ``(B, >= tokens seen)``, last dimension contiguous, False where a token of the row is padding, also
            one that was evicted; None: none is.
        tickets, reference: see :func:`attn_decode_int8`.
    """
    attend: Any = attn_decode_h2o_reference if reference else _op
    return attend(query, *storage, tickets, mask, scaling)
