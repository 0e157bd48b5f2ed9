"""What the references share of the H2O cache: its slots, and which of them may be evicted.

The rule is that of Zhang et al., 2023, "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language
Models", with attention sinks (Xiao et al., 2024, "Efficient Streaming Language Models with Attention Sinks").
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from hf_fastpath.ops.kv_fp8_append import FP8, FP8_MAX

SMALLEST_SCALE = 2.0**-24  # of float16


class Slots(NamedTuple):
    """The storage of :class:`hf_fastpath.caches.h2o.H2OKVLayer`, which describes it."""

    k_data: torch.Tensor
    k_scale: torch.Tensor
    v_data: torch.Tensor
    v_scale: torch.Tensor
    scores: torch.Tensor
    positions: torch.Tensor
    counts: torch.Tensor

    @property
    def seen(self) -> int:
        """Tokens that there were; on a GPU the host waits for it."""
        return int(self.counts[0, 0, 0])

    def used(self, seen: int) -> int:
        """How many slots are in use, the first ones."""
        return min(seen, self.k_data.shape[2])


def quantize_fp8_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 payload of x ``(..., D)`` and float16 scales ``(...)``, each the smallest power of two, not below 2^-24, by
    which the token divided is at most 448."""
    wide = x.float()
    mantissa, exponent = torch.frexp(wide.abs().amax(-1) / FP8_MAX)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    scale = torch.ldexp(torch.ones_like(mantissa), exponent).clamp(SMALLEST_SCALE, 2.0**15)
    return (wide / scale.unsqueeze(-1)).to(FP8), scale.half()


def priorities(
    scores: torch.Tensor, positions: torch.Tensor, first: torch.Tensor, last: int, window: int, sinks: int
) -> torch.Tensor:
    """What tokens ``(B, H_kv, n)`` are kept by, the least of which goes: the attention that each got; infinity for
    the last ``window`` ones up to token ``last``, and for the first ``sinks`` that are no padding; -1 for padding.

    first: ``(B, H_kv)``, the first token of each row that is no padding.
    """
    start = first.unsqueeze(-1)
    kept = (positions > last - window) | ((positions >= start) & (positions < start + sinks))
    return scores.masked_fill(kept, float("inf")).masked_fill(positions < start, -1.0)


def count_padding(counts: torch.Tensor, mask: torch.Tensor, start: int) -> None:
    """Counts leading padding among the tokens from ``start`` on; mask: bool ``(B, n)``, False where a token is one."""
    leading = (~mask).long().cumprod(-1).sum(-1).to(counts.dtype)  # (B,)
    first = counts[..., 1]
    first += torch.where(first == start, leading.unsqueeze(-1), 0)


def visible_tokens(held: torch.Tensor, number: torch.Tensor, mask: torch.Tensor | None, queries: slice) -> torch.Tensor:
    """Whether each query may attend to each token held, bool ``(B, H_kv, q, n)``.

    Args:
        held: the numbers of the tokens, ``(B, H_kv, n)``; number: those of the queries, ``(q,)``.
        mask: ``(B, all queries, tokens)``, of which ``queries`` are meant; None: causal.
    """
    visible = held[:, :, None] <= number[:, None]
    if mask is None:
        return visible
    rows = mask[:, None, queries].expand(-1, held.shape[1], -1, -1)
    return visible & rows.gather(3, held[:, :, None].expand(-1, -1, rows.shape[2], -1).long())
