"""Cases of attn_received, on a GPU (tests/gpu) and in the emulator alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from kernel_cases import ACCUMULATION, Target, assert_within, generator, poison

from hf_fastpath.ops._slots import visible_tokens


@dataclass(frozen=True)
class Received:
    dtype: torch.dtype
    dim: int = 64
    batch: int = 2
    kv_heads: int = 2
    ratio: int = 2
    tokens: int = 70
    old: int = 0
    start: int = 0  # at least `old`
    padding: bool = False

    def check(self, target: Target) -> None:
        """Against float64. A weight is off by its score's error; below 2^-60 of the largest it may vanish."""
        rng = generator(self.dim, self.tokens, self.old, self.kv_heads)
        keys, heads = self.old + self.tokens, self.kv_heads * self.ratio
        query = (torch.randn(self.batch, heads, self.tokens, self.dim, generator=rng) * 2).to(self.dtype)
        key = torch.randn(self.batch, self.kv_heads, keys, self.dim, generator=rng).to(self.dtype)
        numbers = torch.rand(self.batch, self.kv_heads, max(self.start, 1), generator=rng).argsort(-1)
        positions = torch.nn.functional.pad(numbers[..., : self.old].int(), (0, 3), value=2**30)
        mask, scaling = self._mask(), self.dim**-0.5
        held = torch.cat(
            [
                positions[..., : self.old],
                torch.arange(self.start, self.start + self.tokens).expand(self.batch, self.kv_heads, -1),
            ],
            2,
        )
        number = torch.arange(self.start, self.start + self.tokens)
        visible = visible_tokens(held, number, mask, slice(None)).repeat_interleave(self.ratio, 1)
        wide = key.double().repeat_interleave(self.ratio, 1).mT
        scores = (query.double() @ wide * scaling).masked_fill(~visible, float("-inf"))
        lse = scores.logsumexp(-1)
        weights = scores.softmax(-1).nan_to_num(0.0)
        lse[:, :, 1::5] = float("-inf")  # these do not count
        weights[:, :, 1::5] = 0.0
        exact = weights.sum(2)
        largest = (query.double().abs() @ wide.abs() * scaling).max()
        relative = float(largest) * (self.dim / 16 + 8) * ACCUMULATION + (self.tokens + 64) * 2.0**-23
        moved: list[Any] = [x.to(target.device) for x in (query, key, lse.float(), positions)]
        poison(*exact.shape, dtype=torch.float32, device=target.device)
        args = (*moved, None if mask is None else mask.to(target.device), self.start, scaling)
        got = target.ops.attn_received(*args)
        assert_within(got.cpu(), exact, relative * exact + 2.0**-60)
        assert torch.equal(target.ops.attn_received(*args), got)

    def _mask(self) -> torch.Tensor | None:
        """Causal; row 0 without padding, the others with some on the left; a column more than there are tokens."""
        if not self.padding:
            return None
        total = self.start + self.tokens
        column, row = torch.arange(total + 1), torch.arange(self.start, total)[:, None]
        return torch.stack([(column <= row) & (column >= b * (total // 3)) for b in range(self.batch)])
