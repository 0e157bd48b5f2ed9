"""What writes to the caches, and what expands them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from emulator import IN_OUT, OUTPUT

from emulated.base import EmulatedKernels, inputs_of, new_inputs, new_tokens


class EmulatedKV(EmulatedKernels):
    """See :class:`emulated.EmulatedOps`."""

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

    def _append(self, entry: str, new: Sequence[Any], storage: dict[str, torch.Tensor | None], *options: int) -> None:
        """new: the arguments that the schemas of all appending ops begin with; storage: in the launcher's order, the
        count last, whatever its name."""
        *tensors, lengths = storage.values()
        self._library.call(
            entry,
            *(*new_tokens(new, tensors[0].shape[2], lengths), *tensors, *options, new[1].dtype is torch.bfloat16),
            **new_inputs(new),
            query_out=(new[9], OUTPUT),
            **{name: (tensor, IN_OUT) for name, tensor in storage.items() if tensor is not None},
        )

    def kv_int8_dequantize(self, data: torch.Tensor, scale: torch.Tensor, start: int, out: torch.Tensor) -> None:
        batch, heads, capacity, dim = data.shape
        self._library.call(
            "emulated_kv_int8_dequantize",
            *(data[0, 0, start:], scale[0, 0, start:], out, batch * heads, capacity, out.shape[2], dim),
            out.dtype is torch.bfloat16,
            **inputs_of(data=data, scale=scale),
            out=(out, OUTPUT),
        )

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
            **inputs_of(data=data, scale=scale, tail=tail, sinks=sinks, lengths=lengths),
            out=(out, OUTPUT),
        )
