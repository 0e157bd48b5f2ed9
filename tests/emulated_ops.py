"""The ops of :mod:`hf_fastpath.ops`, computed on CPU tensors by the CUDA kernels in the emulator."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from emulator import IN_OUT, INPUT, OUTPUT, library

from hf_fastpath.ops import QKTransform, TokenState


class EmulatedOps:
    """Each op under its name, with its arguments; see :class:`emulator.KernelFault` for what they raise."""

    def __init__(self, sm_count: int = 3) -> None:
        self._library = library()
        self.sm_count = sm_count  # few: so that a CTA takes several row blocks of a small shape

    def w4a16_linear(
        self,
        x: torch.Tensor,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        bias: torch.Tensor | None,
        out_features: int,
        group_size: int,
    ) -> torch.Tensor:
        packed = (qweight, scales, zeros, bias)
        return self._int4_product(0, x, packed, out_features, None, 0.0, None, out_features, group_size)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self._norm(x, None, weight, eps)[1]

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._norm(x, residual, weight, eps)

    def _norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sums, y = (x.new_empty(x.shape) for _ in range(2))
        self._library.call(
            "emulated_rms_norm",
            *(x, x.stride(0), residual, weight, eps, sums, y, *x.shape, x.dtype is torch.bfloat16),
            **_inputs(x=x, residual=residual, weight=weight),
            sums=(sums, OUTPUT),
            y=(y, OUTPUT),
        )
        return sums, y

    def swiglu(self, x: torch.Tensor) -> torch.Tensor:
        y = x.new_empty(x.shape[0], x.shape[1] // 2)
        self._library.call("emulated_swiglu", x, y, *y.shape, x.dtype is torch.bfloat16, **_inputs(x=x), y=(y, OUTPUT))
        return y

    def rope_angles(
        self, positions: torch.Tensor, inv_freq: torch.Tensor, scaling: float, like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = (like.new_empty(*positions.shape, 2 * inv_freq.shape[0]) for _ in range(2))
        self._library.call(
            "emulated_rope_angles",
            *(positions, inv_freq, scaling, cos, sin, positions.numel(), inv_freq.shape[0]),
            *(like.element_size(), like.dtype is torch.bfloat16),
            **_inputs(positions=positions, inv_freq=inv_freq),
            cos=(cos, OUTPUT),
            sin=(sin, OUTPUT),
        )
        return cos, sin

    def w4a16_linear_fused(
        self,
        x: torch.Tensor,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        bias: torch.Tensor | None,
        norm_weight: torch.Tensor | None,
        eps: float,
        residual: torch.Tensor | None,
        out_features: int,
        group_size: int,
    ) -> torch.Tensor:
        packed = (qweight, scales, zeros, bias)
        return self._int4_product(1, x, packed, out_features, norm_weight, eps, residual, out_features, group_size)

    def w4a16_swiglu(
        self,
        x: torch.Tensor,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        bias: torch.Tensor | None,
        norm_weight: torch.Tensor | None,
        eps: float,
        intermediate_size: int,
        group_size: int,
    ) -> torch.Tensor:
        packed = (qweight, scales, zeros, bias)
        rows = 2 * intermediate_size
        return self._int4_product(2, x, packed, rows, norm_weight, eps, None, intermediate_size, group_size)

    def w4a16_short_conv(
        self,
        x: torch.Tensor,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        bias: torch.Tensor | None,
        norm_weight: torch.Tensor,
        eps: float,
        state: torch.Tensor,
        conv_weight: torch.Tensor,
        conv_bias: torch.Tensor | None,
        mask: torch.Tensor | None,
        group_size: int,
    ) -> torch.Tensor:
        channels, taps = conv_weight.shape
        y, normalized = x.new_empty(x.shape[0], channels), x.new_empty(x.shape)
        self._library.call(
            "emulated_w4a16_short_conv",
            *(x, x.stride(0), qweight, scales, zeros, bias, y, x.shape[0], 3 * channels, x.shape[1], group_size),
            *(norm_weight, eps, state, conv_weight, conv_bias, mask, 0 if mask is None else mask.stride(0)),
            *(channels, taps, normalized, x.dtype is torch.bfloat16, self.sm_count),
            **_inputs(x=x, qweight=qweight, scales=scales, zeros=zeros, bias=bias, norm_weight=norm_weight),
            **_inputs(conv_weight=conv_weight, conv_bias=conv_bias, mask=mask),
            normalized=(normalized, OUTPUT),
            state=(state, IN_OUT),
            y=(y, OUTPUT),
        )
        return y

    def _int4_product(
        self,
        product: int,
        x: torch.Tensor,
        packed: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None],
        rows: int,
        norm_weight: torch.Tensor | None,
        eps: float,
        residual: torch.Tensor | None,
        columns: int,
        group_size: int,
    ) -> torch.Tensor:
        qweight, scales, zeros, bias = packed
        y = x.new_empty(x.shape[0], columns)
        normalized = x.new_empty(x.shape)
        self._library.call(
            "emulated_w4a16_linear",
            *(x, x.stride(0), qweight, scales, zeros, bias, y, x.shape[0], rows, x.shape[1], group_size),
            *(norm_weight, eps, residual, normalized, x.dtype is torch.bfloat16, self.sm_count, product),
            **_inputs(x=x, qweight=qweight, scales=scales, zeros=zeros, bias=bias),
            **_inputs(norm_weight=norm_weight, residual=residual),
            normalized=(normalized, OUTPUT),
            y=(y, OUTPUT),
        )
        return y

    def linear_16bit(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        norm_weight: torch.Tensor | None,
        eps: float,
        residual: torch.Tensor | None,
        float32_out: bool = False,
    ) -> torch.Tensor:
        y = x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32 if float32_out else x.dtype)
        return self._16bit_product(x, weight, bias, norm_weight, eps, residual, y, float32_out, False)

    def linear_16bit_swiglu(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        norm_weight: torch.Tensor | None,
        eps: float,
    ) -> torch.Tensor:
        y = x.new_empty((x.shape[0], weight.shape[0] // 2))
        return self._16bit_product(x, weight, bias, norm_weight, eps, None, y, False, True)

    def _16bit_product(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        norm_weight: torch.Tensor | None,
        eps: float,
        residual: torch.Tensor | None,
        y: torch.Tensor,
        float32_out: bool,
        swiglu: bool,
    ) -> torch.Tensor:
        normalized = x.new_empty(x.shape)
        self._library.call(
            "emulated_linear_16bit",
            *(x, x.stride(0), weight, bias, y, x.shape[0], *weight.shape, norm_weight, eps, residual, normalized),
            *(float32_out, x.dtype is torch.bfloat16, self.sm_count, swiglu),
            **_inputs(x=x, weight=weight, bias=bias, norm_weight=norm_weight, residual=residual),
            normalized=(normalized, OUTPUT),
            y=(y, OUTPUT),
        )
        return y

    def w8a16_linear(
        self,
        x: torch.Tensor,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        out_features: int,
    ) -> torch.Tensor:
        y = x.new_empty(x.shape[0], out_features)
        self._library.call(
            "emulated_w8a16_linear",
            *(x, x.stride(0), qweight, scales, bias, y, x.shape[0], out_features, x.shape[1]),
            *(x.dtype is torch.bfloat16, self.sm_count),
            **_inputs(x=x, qweight=qweight, scales=scales, bias=bias),
            y=(y, OUTPUT),
        )
        return y

    def w8a16_dequantize(self, qweight: torch.Tensor, scales: torch.Tensor, out_features: int) -> torch.Tensor:
        out = scales.new_empty(out_features, qweight.shape[1] * 32)
        self._library.call(
            "emulated_w8a16_dequantize",
            *(qweight, scales, out, *out.shape, scales.dtype is torch.bfloat16),
            **_inputs(qweight=qweight, scales=scales),
            out=(out, OUTPUT),
        )
        return out

    def w4a16_gemm(
        self,
        x: torch.Tensor,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        bias: torch.Tensor | None,
        out_features: int,
        group_size: int,
        variant: int,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        (m, k), n = x.shape, out_features
        y = x.new_empty(m, n)
        floats = self._floats("emulated_w4a16_gemm_workspace_floats", m, n, k, variant, self.sm_count)
        workspace = torch.empty(floats)
        self._library.call(
            "emulated_w4a16_gemm",
            *(x, x.stride(0), qweight, scales, zeros, bias, y, workspace),
            *(m, n, k, group_size, variant, residual, x.dtype is torch.bfloat16, self.sm_count),
            **_inputs(x=x, qweight=qweight, scales=scales, zeros=zeros, bias=bias, residual=residual),
            y=(y, OUTPUT),
            workspace=(workspace, OUTPUT),
        )
        return y

    def w4a16_gemm_swiglu(
        self,
        x: torch.Tensor,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        bias: torch.Tensor | None,
        intermediate_size: int,
        group_size: int,
        variant: int,
    ) -> torch.Tensor:
        m, k = x.shape
        y = x.new_empty(m, intermediate_size)
        self._library.call(
            "emulated_w4a16_gemm_swiglu",
            *(x, x.stride(0), qweight, scales, zeros, bias, y),
            *(m, 2 * intermediate_size, k, group_size, variant, x.dtype is torch.bfloat16, self.sm_count),
            **_inputs(x=x, qweight=qweight, scales=scales, zeros=zeros, bias=bias),
            y=(y, OUTPUT),
        )
        return y

    def w4a16_dequantize(
        self,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        in_features: int,
        out_features: int,
        group_size: int,
    ) -> torch.Tensor:
        out = scales.new_empty(out_features, in_features)
        self._library.call(
            "emulated_w4a16_dequantize",
            *(qweight, scales, zeros, out, out_features, in_features, group_size, scales.dtype is torch.bfloat16),
            **_inputs(qweight=qweight, scales=scales, zeros=zeros),
            out=(out, OUTPUT),
        )
        return out

    def kv_static_append(self, *args: Any) -> None:
        names = ("keys", "values", "lengths")
        self._append("emulated_kv_static_append", args[:10], dict(zip(names, args[10:], strict=True)))

    def kv_int8_append(self, *args: Any) -> None:
        names = ("k_data", "k_scale", "v_data", "v_scale", "lengths")
        self._append("emulated_kv_int8_append", args[:10], dict(zip(names, args[10:], strict=True)))

    def kv_fp8_append(self, *args: Any) -> None:
        names = ("k_data", "k_scale", "k_tail", "v_data", "v_scale", "v_tail", "lengths")
        self._append("emulated_kv_fp8_append", args[:10], dict(zip(names, args[10:], strict=True)))

    def kv_int4_append(self, *args: Any) -> None:
        sides = [f"{side}_{name}" for side in "kv" for name in ("data", "params", "tail", "sinks")]
        sizes = args[12].shape[2], args[13].shape[2]
        self._append(
            "emulated_kv_int4_append", args[:10], dict(zip((*sides, "lengths"), args[10:], strict=True)), *sizes
        )

    def kv_h2o_append(self, *args: Any) -> None:
        names = ("k_data", "k_scale", "v_data", "v_scale", "scores", "positions", "counts")
        self._append("emulated_kv_h2o_append", args[:10], dict(zip(names, args[10:17], strict=True)), *args[17:])

    def kv_fp8_dequantize(
        self,
        data: torch.Tensor,
        scale: torch.Tensor,
        tail: torch.Tensor,
        lengths: torch.Tensor,
        start: int,
        out: torch.Tensor,
    ) -> None:
        self._dequantize(8, data, scale, tail, None, lengths, False, start, out)

    def kv_int4_dequantize(
        self,
        data: torch.Tensor,
        params: torch.Tensor,
        tail: torch.Tensor,
        sinks: torch.Tensor,
        lengths: torch.Tensor,
        values: bool,
        start: int,
        out: torch.Tensor,
    ) -> None:
        self._dequantize(4, data, params, tail, sinks, lengths, values, start, out)

    def _dequantize(
        self,
        bits: int,
        data: torch.Tensor,
        scale: torch.Tensor,
        tail: torch.Tensor,
        sinks: torch.Tensor | None,
        lengths: torch.Tensor,
        values: bool,
        start: int,
        out: torch.Tensor,
    ) -> None:
        group, front = tail.shape[2], 0 if sinks is None else sinks.shape[2]
        self._library.call(
            "emulated_kv_dequantize",
            *(bits, data, scale, tail, sinks, lengths, out, lengths.numel(), scale.shape[2] * group),
            *(start, *out.shape[2:], group, front, values, out.dtype is torch.bfloat16),
            **_inputs(data=data, scale=scale, tail=tail, sinks=sinks, lengths=lengths),
            out=(out, OUTPUT),
        )

    def _append(self, entry: str, new: Sequence[Any], storage: dict[str, torch.Tensor], *options: int) -> None:
        """new: the arguments that the schemas of all appending ops begin with; storage: in the launcher's order, the
        count last, whatever its name."""
        *tensors, lengths = storage.values()
        self._library.call(
            entry,
            *(*_new_tokens(new, tensors[0].shape[2], lengths), *tensors, *options, new[1].dtype is torch.bfloat16),
            **_new_inputs(new),
            query_out=(new[9], OUTPUT),
            **{name: (tensor, IN_OUT) for name, tensor in storage.items()},
        )

    def kv_int8_dequantize(self, data: torch.Tensor, scale: torch.Tensor, start: int, out: torch.Tensor) -> None:
        batch, heads, capacity, dim = data.shape
        self._library.call(
            "emulated_kv_int8_dequantize",
            *(data[0, 0, start:], scale[0, 0, start:], out, batch * heads, capacity, out.shape[2], dim),
            out.dtype is torch.bfloat16,
            **_inputs(data=data, scale=scale),
            out=(out, OUTPUT),
        )

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
            **_inputs(query=query, key=key, lse=lse, positions=positions, mask=mask),
            out=(out, OUTPUT),
        )
        return out

    def short_conv_prefill(
        self,
        bcx: torch.Tensor,
        state: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        (batch, tokens, _), (channels, taps) = bcx.shape, weight.shape
        out = bcx.new_empty(batch, tokens, channels)
        if batch == 0:
            return out
        dtype = (torch.float16, torch.bfloat16, torch.float32).index(bcx.dtype)
        self._library.call(
            "emulated_short_conv",
            *(bcx, *bcx.stride()[:2], state, weight, bias, mask, *((0, 0) if mask is None else mask.stride())),
            *(out, batch, tokens, channels, taps, dtype, self.sm_count),
            **_inputs(bcx=bcx, weight=weight, bias=bias, mask=mask),
            state=(state, IN_OUT),
            out=(out, OUTPUT),
        )
        return out

    def short_conv_step(
        self,
        bcx: torch.Tensor,
        state: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        mask = None if mask is None else mask.unsqueeze(1)
        return self.short_conv_prefill(bcx.unsqueeze(1), state, weight, bias, mask).squeeze(1)

    def limit_shared_memory(self, bytes_: int) -> None:
        """To what a CTA can have on another GPU."""
        self._library.entry("emulator_set_shared_limit")(bytes_)

    def assume_written_since(self, amount: int) -> None:
        """What kernels read early (load_early()) is so much less than what they read in the end."""
        self._library.entry("emulator_set_written_since")(amount)

    def run_ctas_in_order(self, order: int) -> None:
        """0: as they are numbered, 1: the last one first, other numbers: by chance."""
        self._library.entry("emulator_set_cluster_order")(order)

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
            *(slot_scores, totals, *_mask_args(mask), scores, counts, batch, heads, kv_heads, slots),
            **_inputs(slot_scores=slot_scores, totals=totals, mask=mask),
            scores=(scores, IN_OUT),
            counts=(counts, IN_OUT),
        )
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
            *(form, *_new_tokens(new, storage[0].shape[2], storage[-1])),
            *(stored.get(name) for name in ("k_data", "k_scale", "v_data", "v_scale")),
            *(*_mask_args(mask), out, scratch, tickets, float(scaling), query.dtype is torch.bfloat16),
            **_new_inputs(new),
            **_inputs(mask=mask),
            query_out=(ready, OUTPUT),
            **{name: (tensor, IN_OUT) for name, tensor in stored.items()},
            scratch=(scratch, OUTPUT),
            tickets=(tickets, IN_OUT),
            out=(out, OUTPUT),
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
                    *_mask_args(mask),
                    sinks,
                    out,
                    scratch,
                    tickets,
                ),
                *(batch, heads, kv_heads, dim, capacity, group, front, window, float(scaling), float(softcap)),
                *(*extra, query.dtype is torch.bfloat16, floats),
                **_inputs(query=query, lengths=lengths, mask=mask, sinks=sinks, positions=extra[0], **inputs),
                **(buffers or {}),
                out=(out, OUTPUT),
                scratch=(scratch, OUTPUT),
                tickets=(tickets, IN_OUT),
            )

        floats = torch.zeros(1, dtype=torch.int64)
        call(None, floats)
        call(torch.empty(int(floats)), None)
        return out

    def moe_router(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        expert_bias: torch.Tensor | None,
        top_k: int,
        normalize: bool,
        scaling: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self._moe_router(x, None, 0.0, None, weight, expert_bias, top_k, normalize, scaling)

    def moe_norm_router(
        self, x: torch.Tensor, norm_weight: torch.Tensor, norm_eps: float, *router: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        normalized = torch.empty_like(x)
        _, shares, experts = self._moe_router(x, norm_weight, norm_eps, normalized, *router)
        return normalized, shares, experts

    def _moe_router(
        self,
        x: torch.Tensor,
        norm_weight: torch.Tensor | None,
        norm_eps: float,
        normalized: torch.Tensor | None,
        weight: torch.Tensor,
        expert_bias: torch.Tensor | None,
        top_k: int,
        normalize: bool,
        scaling: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        (rows, hidden), count = x.shape, weight.shape[0]
        logits, shares = x.new_empty(rows, count), x.new_empty(rows, top_k)
        experts = torch.empty(rows, top_k, dtype=torch.int64)
        self._library.call(
            "emulated_moe_router",
            *(x, weight, expert_bias, logits, shares, experts, rows, hidden, count, top_k, normalize, float(scaling)),
            *(norm_weight, float(norm_eps), normalized, x.dtype is torch.bfloat16, self.sm_count),
            **_inputs(x=x, weight=weight, expert_bias=expert_bias, norm_weight=norm_weight),
            normalized=(normalized, OUTPUT),
            logits=(logits, OUTPUT),
            shares=(shares, OUTPUT),
            experts=(experts, OUTPUT),
        )
        return logits, shares, experts

    def moe_experts(
        self,
        x: torch.Tensor,
        experts: torch.Tensor,
        shares: torch.Tensor,
        gate_up_qweight: torch.Tensor,
        gate_up_scales: torch.Tensor,
        gate_up_zeros: torch.Tensor | None,
        down_qweight: torch.Tensor,
        down_scales: torch.Tensor,
        down_zeros: torch.Tensor | None,
        intermediate_size: int,
        gate_up_group_size: int,
        down_group_size: int,
        variant: int,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        (rows, hidden), top_k, count = x.shape, experts.shape[1], gate_up_qweight.shape[0]
        y = torch.empty_like(x)

        def call(workspace: torch.Tensor | None, size: torch.Tensor | None) -> None:
            self._library.call(
                "emulated_moe_experts",
                *(x, experts, shares, gate_up_qweight, gate_up_scales, gate_up_zeros, gate_up_group_size),
                *(down_qweight, down_scales, down_zeros, down_group_size, residual, workspace, y),
                *(rows, top_k, count, hidden, intermediate_size, variant, x.dtype is torch.bfloat16, self.sm_count),
                size,
                **_inputs(x=x, experts=experts, shares=shares, residual=residual),
                **_inputs(gate_up_qweight=gate_up_qweight, gate_up_scales=gate_up_scales, gate_up_zeros=gate_up_zeros),
                **_inputs(down_qweight=down_qweight, down_scales=down_scales, down_zeros=down_zeros),
                workspace=(workspace, OUTPUT),
                y=(y, OUTPUT),
            )

        size = torch.tensor([2 * rows * top_k * intermediate_size])
        if variant:
            call(None, size)
        call(torch.empty(int(size), dtype=torch.uint8), None)
        return y

    def choose_tokens(
        self,
        scores: torch.Tensor,
        noise: torch.Tensor | None,
        end: torch.Tensor | None,
        pad: torch.Tensor | None,
        state: TokenState,
    ) -> None:
        rows, vocabulary = scores.shape
        ends = 0 if end is None else end.numel()
        parts = torch.empty(
            (rows, self._floats("emulated_choose_tokens_parts", rows, vocabulary, self.sm_count)), dtype=torch.int64
        )
        dtype = (torch.float16, torch.bfloat16, torch.float32).index(scores.dtype)
        self._library.call(
            "emulated_choose_tokens",
            *(scores, scores.stride(0), noise, end, ends, pad, state.ids, state.positions, state.unfinished),
            *(state.done, state.report, state.tokens, state.tokens.stride(0), state.tokens.shape[1], state.counted),
            *(parts, rows, vocabulary, dtype, self.sm_count),
            **_inputs(scores=scores, noise=noise, end=end, pad=pad),
            ids=(state.ids, OUTPUT),
            positions=(state.positions, IN_OUT),
            unfinished=(state.unfinished, IN_OUT),
            done=(state.done, IN_OUT),
            report=(state.report, IN_OUT),
            tokens=(state.tokens, IN_OUT),
            count=(state.counted, IN_OUT),
            parts=(parts, OUTPUT),
        )

    def sampling_weights(
        self, logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float
    ) -> torch.Tensor:
        rows, vocabulary = logits.shape
        out, thresholds = torch.empty(rows, vocabulary), torch.empty(rows, 2, dtype=torch.int64)
        factor = float(1 / torch.tensor(temperature, dtype=torch.float32))
        self._library.call(
            "emulated_sampling_weights",
            *(logits, logits.stride(0), out, factor, top_k if top_k < vocabulary else 0, 1 - top_p, min_p),
            *(thresholds, rows, vocabulary, (torch.float16, torch.bfloat16, torch.float32).index(logits.dtype)),
            **_inputs(logits=logits),
            out=(out, OUTPUT),
            thresholds=(thresholds, OUTPUT),
        )
        return out

    def moe_experts_16bit(
        self,
        x: torch.Tensor,
        experts: torch.Tensor,
        shares: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        (rows, hidden), top_k, (count, _, inner) = x.shape, experts.shape[1], down.shape
        workspace, y = x.new_empty(rows * top_k, inner), torch.empty_like(x)
        self._library.call(
            "emulated_moe_experts_16bit",
            *(x, experts, shares, gate_up, down, residual, workspace, y, rows, top_k, count, hidden, inner),
            *(x.dtype is torch.bfloat16, self.sm_count),
            **_inputs(x=x, experts=experts, shares=shares, gate_up=gate_up, down=down, residual=residual),
            workspace=(workspace, OUTPUT),
            y=(y, OUTPUT),
        )
        return y

    def _floats(self, entry_name: str, *sizes: int) -> int:
        entry = self._library.entry(entry_name)
        entry.restype = ctypes.c_int64
        return int(entry(*map(ctypes.c_int64, sizes)))


def _new_tokens(new: Sequence[Any], capacity: int, lengths: torch.Tensor) -> list[Any]:
    """The arguments of an entry that are NEW_TOKENS, of what an appending op begins with."""
    query, key, value, q_norm, k_norm, eps, cos, sin, rotate, query_out = new
    batch, kv_heads, tokens, dim = key.shape
    heads = kv_heads if query is None else query.shape[1]
    turned = () if cos is None else (cos, sin)
    angles = [
        arg
        for angle in turned or (None, None)
        for arg in ((None, 0, 0) if angle is None else (angle, angle.stride(0) * (len(angle) > 1), angle.stride(1)))
    ]
    return [
        *(None if query is None else query, *((0, 0, 0) if query is None else query.stride()[:3])),
        *(key, *key.stride()[:3], value, *value.stride()[:3], query_out, q_norm, k_norm, float(eps), *angles),
        *(cos.shape[-1] if turned else 0, rotate, batch, heads, kv_heads, tokens, dim, capacity, lengths),
    ]


def _new_inputs(new: Sequence[Any]) -> dict[str, tuple[torch.Tensor | None, int]]:
    query, key, value, q_norm, k_norm, _, cos, sin, *_ = new
    return _inputs(query=query, key=key, value=value, q_norm=q_norm, k_norm=k_norm, cos=cos, sin=sin)


def _mask_args(mask: torch.Tensor | None) -> tuple[torch.Tensor | None, int, int]:
    """A mask, its row stride and its columns."""
    return (None, 0, 0) if mask is None else (mask, mask.stride(0), mask.shape[1])


def _inputs(**tensors: torch.Tensor | None) -> dict[str, tuple[torch.Tensor | None, int]]:
    return {name: (tensor, INPUT) for name, tensor in tensors.items()}
