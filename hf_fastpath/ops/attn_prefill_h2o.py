"""Attention of a prompt chunk over the H2O cache and over itself, after which the chunk is in the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hf_fastpath.ops import _library, _prefill_cuda
from hf_fastpath.ops._attention import masked_softmax
from hf_fastpath.ops._slots import Slots, count_padding, priorities, quantize_fp8_tokens, visible_tokens

QUERIES = 128  # at a time, so that the weights of a long chunk are never in memory as a whole

SCHEMA = (
    "attn_prefill_h2o(Tensor query, Tensor key, Tensor value, Tensor(a!) k_data, Tensor(b!) k_scale, "
    "Tensor(c!) v_data, Tensor(d!) v_scale, Tensor(e!) scores, Tensor(f!) positions, Tensor(g!) counts, Tensor? mask, "
    "int start, float scaling, int window, int sinks) -> Tensor"
)


def attn_prefill_h2o_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    k_data: torch.Tensor,
    k_scale: torch.Tensor,
    v_data: torch.Tensor,
    v_scale: torch.Tensor,
    scores: torch.Tensor,
    positions: torch.Tensor,
    counts: torch.Tensor,
    mask: torch.Tensor | None,
    start: int,
    scaling: float,
    window: int,
    sinks: int,
) -> torch.Tensor:
    """Computed in float32, some queries at a time."""
    slots = Slots(k_data, k_scale, v_data, v_scale, scores, positions, counts)
    return _prefill(_attend, query, key, value, slots, mask, start, scaling, window, sinks)


def _prefill(
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slots: Slots,
    mask: torch.Tensor | None,
    start: int,
    scaling: float,
    window: int,
    sinks: int,
) -> torch.Tensor:
    used, tokens = slots.used(start), key.shape[2]
    positions = slots.positions
    new = torch.arange(start, start + tokens, dtype=positions.dtype, device=positions.device)
    held = torch.cat([positions[:, :, :used], new.expand(*positions.shape[:2], -1)], dim=2)
    out, gained = attend(query, key, value, slots, held, start, mask, scaling)
    if mask is not None:
        own = mask[:, -1, start : start + tokens]  # the last query sees every token that is no padding
        count_padding(slots.counts, own, start)
    gained[:, :, :used] += slots.scores[:, :, :used]
    _keep(slots, key, value, gained, held, start, window, sinks)
    return out


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slots: Slots,
    held: torch.Tensor,
    start: int,
    mask: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The chunk's output ``(B, H, q, D)``, and the attention that the slots in use and the chunk got, ``(B, H_kv, n)``.

    held: the number of each of these tokens.
    """
    batch, heads, tokens, dim = query.shape
    kv_heads, used = key.shape[1], slots.used(start)
    old_keys, old_values = (
        data[:, :, :used].float() * scale[:, :, :used, None].float()
        for data, scale in ((slots.k_data, slots.k_scale), (slots.v_data, slots.v_scale))
    )
    keys, values = torch.cat([old_keys, key.float()], 2), torch.cat([old_values, value.float()], 2)
    q = query.float().unflatten(1, (kv_heads, -1)) * scaling
    out = torch.empty((batch, kv_heads, heads // kv_heads, tokens, dim), device=query.device)
    gained = keys.new_zeros(held.shape)
    for begin in range(0, tokens, QUERIES):
        part = slice(begin, min(begin + QUERIES, tokens))
        number = torch.arange(start + part.start, start + part.stop, device=held.device)
        visible = visible_tokens(held, number, mask, part)
        product = q[:, :, :, part].flatten(2, 3) @ keys.transpose(2, 3)
        weights = masked_softmax(product.unflatten(2, (heads // kv_heads, -1)), visible.unsqueeze(2))
        out[:, :, :, part] = (weights.flatten(2, 3) @ values).unflatten(2, (heads // kv_heads, -1))
        if mask is not None:  # what padding attends to says nothing
            weights = weights * mask[:, part].gather(2, number.expand(batch, -1)[..., None])[:, None, None]
        gained += weights.sum((2, 3))
    return out.flatten(1, 2).to(query.dtype), gained


def _keep(
    slots: Slots,
    key: torch.Tensor,
    value: torch.Tensor,
    gained: torch.Tensor,
    held: torch.Tensor,
    start: int,
    window: int,
    sinks: int,
) -> None:
    """Puts those of the tokens in use and of the chunk into the slots that stay, in the order of their numbers."""
    used, last = slots.used(start), start + key.shape[2] - 1
    count = min(slots.k_data.shape[2], last + 1)
    order = priorities(gained, held, slots.counts[..., 1], last, window, sinks)
    # The newer one of two alike stays: a stable sort of the tokens from the newest to the oldest. Slots have no order.
    newest = held.argsort(dim=-1, descending=True)
    best = order.gather(2, newest).argsort(dim=-1, descending=True, stable=True)[..., :count]
    chosen = newest.gather(2, best)
    chosen = chosen.gather(2, held.gather(2, chosen).argsort(dim=-1))
    is_old, new = chosen < used, (chosen - used).clamp(min=0)
    for x, data, scale in ((key, slots.k_data, slots.k_scale), (value, slots.v_data, slots.v_scale)):
        q, s = quantize_fp8_tokens(x.gather(2, new[..., None].expand(-1, -1, -1, x.shape[3])))
        q = q.view(torch.uint8)
        if used:
            old = chosen.clamp(max=used - 1)
            before = data.view(torch.uint8).gather(2, old[..., None].expand(-1, -1, -1, x.shape[3]))
            q, s = torch.where(is_old[..., None], before, q), torch.where(is_old, scale.gather(2, old), s)
        data[:, :, :count] = q.view(data.dtype)
        scale[:, :, :count] = s
    slots.scores[:, :, :count] = gained.gather(2, chosen)
    slots.positions[:, :, :count] = held.gather(2, chosen)
    slots.counts[..., 0] += key.shape[2]


def _fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    k_data: torch.Tensor,
    k_scale: torch.Tensor,
    v_data: torch.Tensor,
    v_scale: torch.Tensor,
    scores: torch.Tensor,
    positions: torch.Tensor,
    counts: torch.Tensor,
    mask: torch.Tensor | None,
    start: int,
    scaling: float,
    window: int,
    sinks: int,
) -> torch.Tensor:
    return query.new_empty(query.shape)


def _prefill_on_cuda(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    k_data: torch.Tensor,
    k_scale: torch.Tensor,
    v_data: torch.Tensor,
    v_scale: torch.Tensor,
    scores: torch.Tensor,
    positions: torch.Tensor,
    counts: torch.Tensor,
    mask: torch.Tensor | None,
    start: int,
    scaling: float,
    window: int,
    sinks: int,
) -> torch.Tensor:
    slots = Slots(k_data, k_scale, v_data, v_scale, scores, positions, counts)
    return _prefill(_prefill_cuda.attend, query, key, value, slots, mask, start, scaling, window, sinks)


_op = _library.define(SCHEMA, attn_prefill_h2o_reference, _fake, on_cuda=_prefill_on_cuda)


def attn_prefill_h2o(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    storage: Sequence[torch.Tensor],
    mask: torch.Tensor | None,
    start: int,
    scaling: float,
    window: int,
    sinks: int,
    *,
    reference: bool = False,
) -> torch.Tensor:
    """Causal attention of q new tokens over the slots in use and over the new tokens, which are not rounded here;
    ``(B, H, q, D)`` in ``query.dtype``. Afterwards the cache holds those of all these tokens that stay.

    A token's score is the attention that it got from all tokens up to now, padding excepted. What stays is what
    :func:`hf_fastpath.ops.kv_h2o_append` would not evict, all at once: the last ``window`` tokens, the first ``sinks``
    that are no padding, and those with the highest scores, padding last, the newer one of two alike.

    Args:
        query: ``(B, H, q, D)``; key, value: ``(B, H_kv, q, D)``; fp16, bf16 (CPU also fp32). H is a multiple of H_kv;
            head h reads KV head ``h // (H / H_kv)``.
        storage: that of :class:`hf_fastpath.caches.h2o.H2OKVLayer`, which describes it.
        mask: bool ``(B, q, >= tokens seen with the new ones)``, True where a query may attend to a token, also one that
            was evicted; a query's own token is masked when it is padding. None: causal, no padding.
        start: the tokens that there were before, as the storage counts them too; the host need not wait for that.
        reference: run the reference implementation, on any device.
    """
    attend: Any = attn_prefill_h2o_reference if reference else _op
    return attend(query, key, value, *storage, mask, start, scaling, window, sinks)
