"""What the references of decode attention share: attention of one token a row over keys and values that come in tiles.

No tile outlives its use, so that a compressed cache is never in memory as a whole in floats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from hf_fastpath.packing import ceil_div

# Expanded at a time: 1,024 tokens of a head stay in a core's L2 cache.
TILE_TOKENS = 1024


def tiles(length: int) -> list[slice]:
    """The tokens 0 .. length in slices of at most ``TILE_TOKENS``."""
    return [slice(start, min(start + TILE_TOKENS, length)) for start in range(0, length, TILE_TOKENS)]


def in_tiles(stored: torch.Tensor, length: int) -> Iterator[torch.Tensor]:
    """The first tokens of ``(B, H_kv, capacity, D)`` in tiles, float32."""
    return (stored[:, :, tile].float() for tile in tiles(length))


def grouped_queries(query: torch.Tensor, kv_heads: int, scaling: float) -> torch.Tensor:
    """``scaling * query`` ``(B, H, D)`` in float32 as ``(B, H_kv, H / H_kv, D)``."""
    batch, heads, dim = query.shape
    return query.float().view(batch, kv_heads, heads // kv_heads, dim) * scaling


def masked_softmax(scores: torch.Tensor, mask: torch.Tensor | None, sinks: torch.Tensor | None = None) -> torch.Tensor:
    """Softmax over the last dimension where ``mask`` is True, which is broadcast over the other dimensions of scores
    and may be longer in the last; all 0 where it is True nowhere. ``sinks``, broadcast over scores but for their last
    dimension, takes part in the softmax and is left out of the result."""
    tokens = scores.shape[-1]
    if mask is not None:
        scores = scores.masked_fill(~mask[..., :tokens], float("-inf"))
    if sinks is not None:
        return torch.cat([scores, sinks.expand(scores.shape[:-1]).unsqueeze(-1)], dim=-1).softmax(-1)[..., :tokens]
    weights = scores.softmax(-1)
    if mask is not None:
        weights.masked_fill_(~mask[..., :tokens].any(-1, keepdim=True), 0.0)  # softmax of nothing is NaN
    return weights


def attention_weights(
    query: torch.Tensor,
    kv_heads: int,
    keys: Iterable[torch.Tensor],
    mask: torch.Tensor | None,
    scaling: float,
    k_scale: torch.Tensor | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """``softmax(scaling * q K^T)`` in float32, ``(B, H_kv, H / H_kv, T)``.

    Args:
        query: ``(B, H, D)``.
        keys: tiles ``(B, H_kv, n, D)`` in float32, T tokens in all, in their order, each computed when it is used.
        mask: bool, broadcast over the result, True where a token may be attended; None: all.
        k_scale: float32 ``(B, H_kv, T)``, what a token's key is to be multiplied by.
        softcap, sinks: see :func:`decode`.

    A row whose tokens are all masked gives 0.
    """
    q = grouped_queries(query, kv_heads, scaling)
    parts = [q @ key.transpose(2, 3) for key in keys]
    scores = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    if k_scale is not None:
        scores *= k_scale.unsqueeze(2)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return masked_softmax(scores, mask, None if sinks is None else sinks.float().view(kv_heads, -1))


def weighted_sum(
    weights: torch.Tensor, values: Iterable[torch.Tensor], like: torch.Tensor, v_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Values summed with weights ``(B, H_kv, H / H_kv, T)``, in the shape and dtype of ``like``, the query ``(B, H,
    D)``; values and v_scale as the keys of :func:`attention_weights`."""
    if v_scale is not None:
        weights = weights * v_scale.unsqueeze(2)
    out, start = like.new_zeros((*weights.shape[:3], like.shape[2]), dtype=torch.float32), 0
    for value in values:
        stop = start + value.shape[2]
        out += weights[..., start:stop] @ value
        start = stop
    return out.view(like.shape).to(like.dtype)


@dataclass(frozen=True)
class Expanded:
    """The tokens of a cache: keys and values in tiles ``(B, H_kv, n, D)``, float32, in the order of the tokens, each
    computed when it is used; and what they are to be multiplied by, float32 ``(B, H_kv, T)``, or None."""

    keys: Iterable[torch.Tensor]
    values: Iterable[torch.Tensor]
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None


def decode(
    expand: Callable[..., Expanded],
    query: torch.Tensor,
    storage: Sequence[torch.Tensor],
    mask: torch.Tensor | None,
    scaling: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """What every op attn_decode_* computes, ``(B, H, D)`` in ``query.dtype``; see :func:`attn_decode_int8`.

    Args:
        expand: gives the first tokens of a cache from their number and from the storage but for its lengths.
        storage: a format's tensors, the last of them being the lengths.
    """
    lengths = storage[-1][:, 0].tolist()
    if len(set(lengths)) > 1:
        rows = [slice(i, i + 1) for i in range(len(lengths))]
        parts = [
            decode(
                expand,
                query[row],
                [tensor[row] for tensor in storage],
                None if mask is None else mask[row],
                *(scaling, window, softcap, sinks),
            )
            for row in rows
        ]
        return torch.cat(parts)
    length = lengths[0] if lengths else 0
    if not length:
        return torch.zeros_like(query)
    kv_heads, tokens = storage[0].shape[1], expand(length, *storage[:-1])
    seen = _visible(mask, length, window, query.device)
    weights = attention_weights(query, kv_heads, tokens.keys, seen, scaling, tokens.k_scale, softcap, sinks)
    return weighted_sum(weights, tokens.values, query, tokens.v_scale)


def _visible(mask: torch.Tensor | None, length: int, window: int, device: torch.device) -> torch.Tensor | None:
    """Which tokens are attended, broadcast over ``(B, H_kv, H / H_kv, length)``; None: all."""
    seen = None
    if mask is not None:
        seen = mask[:, None, None, :length]
        if seen.shape[-1] < length:
            seen = torch.nn.functional.pad(seen, (0, length - seen.shape[-1]), value=False)
    if window and window < length:
        inside = torch.arange(length, device=device) >= length - window
        seen = inside[None, None, None] if seen is None else seen & inside
    return seen


def bias_of(mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """A mask, bool ``(B or 1, H or 1, q, n)``, as what torch's attention kernels add to the scores of queries ``(B, H,
    ., D)``, in their dtype: rows are aligned to 16 bytes, as the kernels want them, and hidden tokens get the lowest
    number, since minus infinity in a whole row would make it NaN."""
    tokens = mask.shape[3]
    bias = query.new_full((*mask.shape[:3], ceil_div(tokens, 8) * 8), torch.finfo(query.dtype).min)[..., :tokens]
    return bias.masked_fill_(mask, 0.0).expand(query.shape[0], query.shape[1], -1, -1)
