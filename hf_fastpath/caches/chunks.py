"""Attention of a prompt chunk over a compressed cache, of which one tile at a time is in memory in full precision.

A tile's output and the logarithm of its softmax's sum (LSE) come from the attention kernels that torch has; tiles are
added by their LSE, as in Dao et al., 2022, "FlashAttention", algorithm 1, and Milakov and Gimelshein, 2018, "Online
normalizer calculation for softmax".
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch

from hf_fastpath.ops._attention import bias_of
from hf_fastpath.packing import ceil_div

# Keys and values of a tile in full precision; long enough for the kernels to be as fast as over all tokens.
TILE_BYTES = 64 * 2**20
LEAST_TILE_TOKENS = 1024

# Keys and values (B, H_kv, n, D) of the tokens start .. stop, in the query's dtype.
Expand = Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]


def attend_in_tiles(
    query: torch.Tensor, kv_heads: int, length: int, expand: Expand, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """``softmax(scaling * q K^T) V`` of the last q of ``length`` tokens, ``(B, H, q, D)`` in ``query.dtype``.

    Args:
        query: ``(B, H, q, D)``; H is a multiple of ``kv_heads``, head h reads KV head ``h // (H / H_kv)``.
        expand: called for one tile after the other; a tile is not kept.
        mask: bool ``(B or 1, 1, q, length)``, True where a query may attend to a token; None: causal.

    A query that may attend to nothing gives 0. With a mask, the host waits for the GPU once a mask, not once a layer.
    """
    batch, heads, tokens, dim = query.shape
    grouped = query.reshape(batch, kv_heads, heads // kv_heads * tokens, dim)
    in_kernel = _has_kernel(query)
    most = max(TILE_BYTES // (2 * batch * kv_heads * dim * query.element_size()), LEAST_TILE_TOKENS)
    if not in_kernel:  # the scores are in memory too
        most = min(most, max(TILE_BYTES // (4 * batch * heads * tokens), 64))
    bounds = _tile_bounds(length, tokens, most)
    out = lse = None
    for (start, stop), visible in zip(bounds, _all_visible(mask, bounds, tokens), strict=True):
        keys, values = expand(start, stop)
        shown = None
        if not visible:
            shown = _tile_mask(mask, query, start, stop, length)
            shown = shown.repeat(1, 1, heads // kv_heads, 1)  # the queries of a group, one head's behind the other's
        attend = _torch_kernel if in_kernel else _plain
        part, part_lse = attend(grouped, keys, values, shown, scaling)
        if out is None or lse is None:
            out, lse = part.masked_fill_((part_lse == float("-inf")).unsqueeze(-1), 0.0), part_lse
            if len(bounds) > 1:
                out = out.float()
        else:
            lse = _add_tile(out, lse, part, part_lse)
    assert out is not None
    return out.reshape(batch, heads, tokens, dim).to(query.dtype)


def _tile_bounds(length: int, tokens: int, most: int) -> list[tuple[int, int]]:
    """The tokens in tiles of at most ``most``; where one is not enough the chunk's own ones are apart, since only there
    a query's own place matters."""
    if length <= most:
        return [(0, length)]
    bounds: list[tuple[int, int]] = []
    for first, last in ((0, length - tokens), (length - tokens, length)):
        count = ceil_div(last - first, most)
        size = ceil_div(last - first, max(count, 1))
        bounds += [(start, min(start + size, last)) for start in range(first, last, max(size, 1))]
    return bounds


_visible_of_mask: tuple[weakref.ref[torch.Tensor], list[tuple[int, int]], list[bool]] | None = None


def _all_visible(mask: torch.Tensor | None, bounds: list[tuple[int, int]], tokens: int) -> list[bool]:
    """Of each tile, whether every query may attend to all of it. A mask's answer is kept for the model's other
    layers, which come with the same one."""
    global _visible_of_mask
    if mask is None:
        return [stop <= bounds[-1][1] - tokens for _, stop in bounds]
    if _visible_of_mask is not None:
        known, of_bounds, answer = _visible_of_mask
        if known() is mask and of_bounds == bounds:
            return answer
    answer = torch.stack([mask[..., start:stop].all() for start, stop in bounds]).tolist()
    _visible_of_mask = weakref.ref(mask), bounds, answer
    return answer


def _tile_mask(mask: torch.Tensor | None, query: torch.Tensor, start: int, stop: int, length: int) -> torch.Tensor:
    """The tile's part of the mask, ``(B or 1, 1, q, stop - start)``."""
    if mask is not None:
        return mask[..., start:stop]
    place = torch.arange(length - query.shape[2], length, device=query.device)
    return (torch.arange(start, stop, device=query.device) <= place[:, None])[None, None]


def _has_kernel(query: torch.Tensor) -> bool:
    """Whether torch has an attention kernel that gives the LSE for these queries."""
    return query.device.type == "cpu" or (query.is_cuda and query.shape[3] % 8 == 0)


def _torch_kernel(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over one tile, ``(B, H_kv, n, D)``, and its LSE, float32 ``(B, H_kv, n)``, minus infinity where nothing
    is visible, for queries ``(B, H_kv, n, D)`` and a mask, bool ``(B or 1, 1, n, tokens)``."""
    bias = None if mask is None else bias_of(mask, query)
    if query.device.type == "cpu":
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = attend(query, keys, values, attn_mask=bias, scale=scaling)
    elif bias is None and query.dtype is not torch.float32:
        attend = torch.ops.aten._scaled_dot_product_flash_attention
        out, lse = attend(query, keys, values, scale=scaling)[:2]
    else:
        attend = torch.ops.aten._scaled_dot_product_efficient_attention
        out, lse = attend(query, keys, values, bias, True, scale=scaling)[:2]
        lse = lse[..., : query.shape[2]]  # the kernel pads it
    return out, lse if mask is None else lse.masked_fill(~mask.any(-1), float("-inf"))


def _plain(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in float32, whatever the sizes are."""
    scores = (query.float() @ keys.float().transpose(2, 3)) * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - lse.unsqueeze(-1)).exp_()
    if mask is not None:
        weights = weights.masked_fill(~mask, 0.0)  # of a row without a visible token, -inf - -inf is NaN
    return weights @ values.float(), lse


def _add_tile(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> torch.Tensor:
    """Adds a tile to ``out``, the result of the tiles before it, in place; returns the LSE of all of them."""
    total = torch.logaddexp(lse, part_lse)
    reached = total.masked_fill(total == float("-inf"), 0.0)  # -inf - -inf is NaN
    out.mul_((lse - reached).exp_().unsqueeze(-1))
    out.add_(part * (part_lse - reached).exp_().unsqueeze(-1))
    return total
