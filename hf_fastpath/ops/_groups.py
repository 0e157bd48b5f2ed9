"""What the references share of caches that quantize tokens in groups, and keep the latest ones in full precision.

The latest tokens are in a ring ``(B, H_kv, R, D)``: token t is entry ``t % R``. A group of G tokens is quantized as
soon as ``R - G`` tokens follow it, when the ring would otherwise have no room for the next one. What is stored is
counted in ``lengths``, int32 ``(B, H_kv, 2)``: tokens stored, and how many of them (the first ones, a multiple of G)
are quantized. Each head has a copy, so that of a kernel that appends no CTA has to wait for that of another head. The
rows of a batch are equally long.
"""

from __future__ import annotations

import torch


def counts(lengths: torch.Tensor) -> tuple[int, int]:
    """Tokens stored, and quantized."""
    stored, quantized = lengths[0, 0].tolist()
    return stored, quantized


def quantized_after(stored: int, quantized: int, group: int, ring: int) -> int:
    """How many tokens are quantized once ``stored`` are stored, of which ``quantized`` were quantized before."""
    return max(quantized, (stored - (ring - group)) // group * group)


def ring_tokens(tail: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Tokens ``start .. stop`` of a ring, ``(B, H_kv, stop - start, D)``, copied."""
    return tail.index_select(2, torch.arange(start, stop, device=tail.device) % tail.shape[2])


def ring_write(tail: torch.Tensor, x: torch.Tensor, start: int) -> None:
    """Puts x ``(B, H_kv, n, D)`` into a ring as tokens ``start .. start + n``; the last R of them stay."""
    stop = start + x.shape[2]
    kept = x[:, :, -tail.shape[2] :].to(tail.dtype)
    tail.index_copy_(2, torch.arange(stop - kept.shape[2], stop, device=tail.device) % tail.shape[2], kept)


def ring_append(x: torch.Tensor, tail: torch.Tensor, start: int, quantized: int, after: int) -> torch.Tensor:
    """Appends x ``(B, H_kv, n, D)`` to a ring that holds tokens ``quantized .. start``.

    Returns the tokens ``quantized .. after`` that are to be quantized now, ``(B, H_kv, after - quantized, D)``.
    """
    waiting = ring_tokens(tail, quantized, min(start, after))
    ready = torch.cat([waiting, x[:, :, : max(after - start, 0)].to(tail.dtype)], dim=2)
    ring_write(tail, x, start)
    return ready
