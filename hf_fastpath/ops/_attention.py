"""What the references of decode attention share: attention of one token a row over keys and values that come in tiles.

No tile outlives its use, so that a compressed cache is never in memory as a whole in floats.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

# Expanded at a time: 1,024 tokens of a head stay in a core's L2 cache.
TILE_TOKENS = 1024


def tiles(length: int) -> list[slice]:
    """The tokens 0 .. length in slices of at most ``TILE_TOKENS``."""
    return [slice(start, min(start + TILE_TOKENS, length)) for start in range(0, length, TILE_TOKENS)]


def grouped_queries(query: torch.Tensor, kv_heads: int, scaling: float) -> torch.Tensor:
    """``scaling * query`` ``(B, H, D)`` in float32 as ``(B, H_kv, H / H_kv, D)``."""
    batch, heads, dim = query.shape
    return query.float().view(batch, kv_heads, heads // kv_heads, dim) * scaling


def masked_softmax(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Softmax over the last dimension where ``mask`` is True, which is broadcast over the other dimensions of scores
    and may be longer in the last; all 0 where it is True nowhere."""
    if mask is None:
        return scores.softmax(-1)
    mask = mask[..., : scores.shape[-1]]
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return weights.masked_fill_(~mask.any(-1, keepdim=True), 0.0)  # softmax of nothing is NaN


def attention_weights(
    query: torch.Tensor,
    kv_heads: int,
    keys: Iterable[torch.Tensor],
    mask: torch.Tensor | None,
    scaling: float,
    k_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """``softmax(scaling * q K^T)`` in float32, ``(B, H_kv, H / H_kv, T)``.

    Args:
        query: ``(B, H, D)``.
        keys: tiles ``(B, H_kv, n, D)`` in float32, T tokens in all, in their order, each computed when it is used.
        mask: bool, broadcast over the result, True where a token may be attended; None: all.
        k_scale: float32 ``(B, H_kv, T)``, what a token's key is to be multiplied by.

    A row whose tokens are all masked gives 0.
    """
    q = grouped_queries(query, kv_heads, scaling)
    parts = [q @ key.transpose(2, 3) for key in keys]
    scores = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    if k_scale is not None:
        scores *= k_scale.unsqueeze(2)
    return masked_softmax(scores, mask)


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


def attend_tiles(
    query: torch.Tensor,
    kv_heads: int,
    keys: Iterable[torch.Tensor],
    values: Iterable[torch.Tensor],
    mask: torch.Tensor | None,
    scaling: float,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """``softmax(scaling * q K^T) V``, ``(B, H, D)`` in ``query.dtype``: :func:`attention_weights`, with a mask
    ``(B, >= T)`` that all heads share, then :func:`weighted_sum`."""
    weights = attention_weights(query, kv_heads, keys, None if mask is None else mask[:, None, None], scaling, k_scale)
    return weighted_sum(weights, values, query, v_scale)
