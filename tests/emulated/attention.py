"""Attention over the caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from emulator import IN_OUT, OUTPUT

from emulated.base import EmulatedKernels, inputs_of, mask_args, new_inputs, new_tokens
from hf_fastpath.ops import QKTransform


class EmulatedAttention(EmulatedKernels):
    """See :class:`emulated.EmulatedOps`."""

    def attn_decode_static(
        self,
        query: torch.Tensor,
        storage: Sequence[torch.Tensor],
        mask: torch.Tensor | None,
        scaling: float,
        **how: Any,
    ) -> torch.Tensor:
        k, v, lengths = storage
        return self._attn_decode(0, query, [k], [v], lengths, mask, scaling, **how)

    def attn_decode_int8(
        self,
        query: torch.Tensor,
        storage: Sequence[torch.Tensor],
        mask: torch.Tensor | None,
        scaling: float,
        **how: Any,
    ) -> torch.Tensor:
        return self._attn_decode(1, query, storage[:2], storage[2:4], storage[4], mask, scaling, **how)

    def attn_decode_fp8(
        self,
        query: torch.Tensor,
        storage: Sequence[torch.Tensor],
        mask: torch.Tensor | None,
        scaling: float,
        **how: Any,
    ) -> torch.Tensor:
        return self._attn_decode(2, query, storage[:3], storage[3:6], storage[6], mask, scaling, **how)

    def attn_decode_int4(
        self,
        query: torch.Tensor,
        storage: Sequence[torch.Tensor],
        mask: torch.Tensor | None,
        scaling: float,
        **how: Any,
    ) -> torch.Tensor:
        return self._attn_decode(3, query, storage[:4], storage[4:8], storage[8], mask, scaling, **how)

    def attn_decode_h2o(
        self,
        query: torch.Tensor,
        storage: Sequence[torch.Tensor],
        mask: torch.Tensor | None,
        scaling: float,
        **how: Any,
    ) -> torch.Tensor:
        scores, positions, counts = storage[4:]
        batch, heads = query.shape[:2]
        kv_heads, slots = scores.shape[1:]
        slot_scores, totals = torch.empty(batch, heads, slots), torch.empty(batch, heads, 2)
        written = {"slot_scores": (slot_scores, OUTPUT), "totals": (totals, OUTPUT)}
        extra = (positions, slot_scores, totals)
        out = self._attn_decode(
            4, query, storage[:2], storage[2:4], counts, mask, scaling, extra=extra, buffers=written, **how
        )
        self._library.call(
            "emulated_h2o_count",
            *(slot_scores, totals, *mask_args(mask), scores, counts, batch, heads, kv_heads, slots),
            **inputs_of(slot_scores=slot_scores, totals=totals, mask=mask),
            scores=(scores, IN_OUT),
            counts=(counts, IN_OUT),
        )
        return out

    def _attn_decode(
        self,
        form: int,
        query: torch.Tensor,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        lengths: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
        *,
        window: int = 0,
        softcap: float = 0.0,
        sinks: torch.Tensor | None = None,
        tickets: torch.Tensor | None = None,
        extra: tuple[torch.Tensor | None, ...] = (None, None, None),
        buffers: dict[str, tuple[torch.Tensor, int]] | None = None,
    ) -> torch.Tensor:
        batch, heads, dim = query.shape
        kv_heads, capacity = keys[0].shape[1:3]
        out = torch.empty_like(query)
        if tickets is None:
            tickets = torch.zeros(batch * kv_heads, dtype=torch.int32)
        group = keys[2].shape[2] if len(keys) > 2 else 0
        front = keys[3].shape[2] if len(keys) > 3 else 0
        sides = [[*side, *[None] * (4 - len(side))] for side in (keys, values)]
        names = [f"{side}_{part}" for side in "kv" for part in ("data", "scale", "tail", "front")]
        inputs = dict(zip(names, sides[0] + sides[1], strict=True))

        def call(scratch: torch.Tensor | None, floats: torch.Tensor | None) -> None:
            self._library.call(
                "emulated_attn_decode",
                *(
                    form,
                    query,
                    *sides[0],
                    *sides[1],
                    lengths,
                    lengths.stride(1),
                    *mask_args(mask),
                    sinks,
                    out,
                    scratch,
                    tickets,
                ),
                *(batch, heads, kv_heads, dim, capacity, group, front, window, float(scaling), float(softcap)),
                *(*extra, query.dtype is torch.bfloat16, floats),
                **inputs_of(query=query, lengths=lengths, mask=mask, sinks=sinks, positions=extra[0], **inputs),
                **(buffers or {}),
                out=(out, OUTPUT),
                scratch=(scratch, OUTPUT),
                tickets=(tickets, IN_OUT),
            )

        floats = torch.zeros(1, dtype=torch.int64)
        call(None, floats)
        call(torch.empty(int(floats)), None)
        return out

    def attn_step_static(self, *new: Any, **how: Any) -> torch.Tensor:
        return self._attn_step(0, ("k_data", "v_data", "lengths"), *new, **how)

    def attn_step_int8(self, *new: Any, **how: Any) -> torch.Tensor:
        return self._attn_step(1, ("k_data", "k_scale", "v_data", "v_scale", "lengths"), *new, **how)

    def _attn_step(
        self,
        form: int,
        names: Sequence[str],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        storage: Sequence[torch.Tensor],
        mask: torch.Tensor | None,
        scaling: float,
        *,
        transform: QKTransform,
        tickets: torch.Tensor,
    ) -> torch.Tensor:
        stored = dict(zip(names, storage, strict=True))
        (batch, heads, _, dim), t = query.shape, transform
        ready, out = query.new_empty(query.shape), query.new_empty(batch, heads, dim)
        splits = 64  # the most there can be
        scratch = torch.empty(batch * heads * 8 * splits * (256 + 2))
        new = (query, key, value, t.q_norm, t.k_norm, t.eps, t.cos, t.sin, t.rotate, ready)
        self._library.call(
            "emulated_attn_step",
            *(form, *new_tokens(new, storage[0].shape[2], storage[-1])),
            *(stored.get(name) for name in ("k_data", "k_scale", "v_data", "v_scale")),
            *(*mask_args(mask), out, scratch, tickets, float(scaling), query.dtype is torch.bfloat16),
            **new_inputs(new),
            **inputs_of(mask=mask),
            query_out=(ready, OUTPUT),
            **{name: (tensor, IN_OUT) for name, tensor in stored.items()},
            scratch=(scratch, OUTPUT),
            tickets=(tickets, IN_OUT),
            out=(out, OUTPUT),
        )
        return out

    def attn_received(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        lse: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
        start: int,
        scaling: float,
    ) -> torch.Tensor:
        batch, heads, tokens, dim = query.shape
        kv_heads, keys = key.shape[1:3]
        out = torch.empty(batch, heads, keys)
        self._library.call(
            "emulated_attn_received",
            *(query, key, lse, tokens, positions, positions.shape[2], mask),
            *((0, 0) if mask is None else mask.stride()[:2]),
            *(start, out, batch, heads, kv_heads, tokens, keys, keys - tokens, dim, float(scaling)),
            query.dtype is torch.bfloat16,
            **inputs_of(query=query, key=key, lse=lse, positions=positions, mask=mask),
            out=(out, OUTPUT),
        )
        return out
