"""Calls of the ops attn_step_*, on a GPU and in the emulator alike: the bits of the two ops that each is one of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from append_cases import as_projected, shifted
from kernel_cases import Target, generator

from hf_fastpath.caches import Int8KVCache, StaticKVCache
from hf_fastpath.ops import QKTransform
from hf_fastpath.ops._append import call

FORMATS: dict[str, Any] = {"static": StaticKVCache, "int8": Int8KVCache}


@dataclass(frozen=True)
class Step:
    """Rows of some lengths, to each of which tokens are added, ``steps`` of them one after the other."""

    form: str
    dtype: torch.dtype
    lengths: Sequence[int]
    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    steps: int = 2
    norm: bool = False
    rotary: int = 0
    rotate: bool = False
    masked: bool = False
    vectors: bool = True  # False: inputs whose rows are aligned to one element only
    room: int = 0  # tokens more than there will be

    def storage(self, target: Target) -> list[torch.Tensor]:
        """What was appended before, and behind it numbers that must not reach a result."""
        rng = generator(self.dim, *self.lengths)
        layer, most = FORMATS[self.form].layer_class(), max(self.lengths)
        key, value = (
            torch.randn(len(self.lengths), self.kv_heads, most + 1, self.dim, generator=rng).to(self.dtype)
            for _ in range(2)
        )
        capacity = -(-(most + self.steps + self.room) // 16) * 16
        storage = layer.allocate(key, value, capacity)
        call(getattr(torch.ops.hf_fastpath, f"kv_{self.form}_append"), key, value, storage, QKTransform(), None)
        for row, length in enumerate(self.lengths):
            for tensor in storage[:-1]:
                tensor[row, :, length:] = float("nan") if tensor.dtype.is_floating_point else 127
            storage[-1][row] = length
        return [tensor.to(target.device) for tensor in storage]

    def inputs(self, step: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, QKTransform]:
        """Query, key, value and transform of a step."""
        rng, batch = generator(step, self.dim), len(self.lengths)
        rows = [as_projected(rng, batch, 1, n, self.dim, self.dtype) for n in (self.heads, *[self.kv_heads] * 2)]
        query, key, value = (x.to(device) if self.vectors else shifted(x.to(device)) for x in rows)
        weights = (torch.rand(2, self.dim, generator=rng) + 0.5).to(self.dtype).to(device)
        angles = torch.rand(batch, 1, self.rotary // 2, generator=rng).repeat(1, 1, 2).to(device) * 6
        turned = (angles.cos().to(self.dtype), angles.sin().to(self.dtype)) if self.rotary else (None, None)
        q_norm, k_norm = (weights[0].clone(), weights[1].clone()) if self.norm else (None, None)
        return query, key, value, QKTransform(q_norm, k_norm, 1e-5, *turned, self.rotate)

    def mask(self, step: int, device: str) -> torch.Tensor | None:
        if not self.masked:
            return None
        rng = generator(step, 3)
        return (torch.rand(len(self.lengths), max(self.lengths) + self.steps + 3, generator=rng) < 0.6).to(device)

    def check(self, target: Target) -> None:
        on_gpu = target.device != "cpu"
        append = getattr(torch.ops.hf_fastpath if on_gpu else target.ops, f"kv_{self.form}_append")
        attend, step_op = (getattr(target.ops, f"attn_{name}_{self.form}") for name in ("decode", "step"))
        ours, theirs = self.storage(target), self.storage(target)
        count = len(self.lengths) * self.kv_heads + 2  # more than the call needs
        tickets, scaling = torch.zeros(count, dtype=torch.int32, device=target.device), self.dim**-0.5
        for step in range(self.steps):
            query, key, value, transform = self.inputs(step, target.device)
            mask = self.mask(step, target.device)
            ready = call(append, key, value, theirs, transform, query)
            assert ready is not None
            expected = attend(ready.squeeze(2), theirs, mask, scaling)
            out = step_op(query, key, value, ours, mask, scaling, transform=transform, tickets=tickets)
            assert torch.equal(out, expected)
            for got, want in zip(ours, theirs, strict=True):
                assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))
            assert not bool(tickets.any())  # as the next call wants them
            assert bool(expected.isfinite().all())
