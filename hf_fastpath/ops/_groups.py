"""What the references share of caches that quantize tokens in groups of G, each when it is full.

The tokens of the group that is not full yet are in a tail ``(B, H_kv, G, D)`` in full precision: token t is entry
``t % G``. What is stored is counted in ``lengths``, int32 ``(B, H_kv)``; the first ``lengths // G * G`` tokens are
quantized. A format may keep ``sinks`` tokens in front of them in full precision: then tokens are numbered from behind
those. The rows of a batch are equally long.
"""

from __future__ import annotations

import torch

from hf_fastpath.packing import ceil_div


def tokens_stored(lengths: torch.Tensor) -> int:
    return int(lengths[0, 0])


def quantized_of(stored: int, group: int, sinks: int = 0) -> int:
    """How many of the tokens are quantized, those in front of the groups not counted."""
    return max(stored - sinks, 0) // group * group


def groups_of(start: int, stop: int, group: int) -> tuple[slice, int]:
    """The groups that hold the tokens ``start .. stop``, and how many tokens these are."""
    return slice(start // group, ceil_div(stop, group)), max(stop - start, 0)


def tail_write(tail: torch.Tensor, x: torch.Tensor, start: int) -> None:
    """Puts x ``(B, H_kv, n, D)`` into a tail as tokens ``start .. start + n``; the last G of them stay."""
    stop = start + x.shape[2]
    kept = x[:, :, -tail.shape[2] :].to(tail.dtype)
    tail.index_copy_(2, torch.arange(stop - kept.shape[2], stop, device=tail.device) % tail.shape[2], kept)


def take_sinks(x: torch.Tensor, sinks: torch.Tensor, start: int) -> torch.Tensor:
    """Puts those of the tokens x ``(B, H_kv, n, D)``, the first being number ``start``, that are among the first S into
    ``sinks`` ``(B, H_kv, S, D)``; returns the others."""
    count = min(max(sinks.shape[2] - start, 0), x.shape[2])
    if count:
        sinks[:, :, start : start + count] = x[:, :, :count]
    return x[:, :, count:]


def tail_append(x: torch.Tensor, tail: torch.Tensor, start: int) -> torch.Tensor:
    """Appends x ``(B, H_kv, n, D)`` to the tail of a cache that has ``start`` tokens.

    Returns the tokens of the groups that are full now, ``(B, H_kv, m, D)``, m a multiple of G.
    """
    group = tail.shape[2]
    waiting = start % group
    full = quantized_of(waiting + x.shape[2], group)
    ready = torch.cat([tail[:, :, : waiting if full else 0], x[:, :, : max(full - waiting, 0)].to(tail.dtype)], dim=2)
    tail_write(tail, x, start)
    return ready
