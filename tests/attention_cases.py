"""Calls of the ops attn_decode_*, their exact results and error bounds, on a GPU and in the emulator alike.

What is stored beyond a row's length is NaN and the largest code: it must not reach a result.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from kernel_cases import ACCUMULATION, ROUNDING, Target, assert_within, poison

from hf_fastpath.ops.kv_int4_append import value_groups
from hf_fastpath.ops.kv_int4_dequantize import expand_keys, expand_values

FORMATS = ("static", "int8", "fp8", "int4")
FP8 = torch.float8_e4m3fn
NAN = float("nan")


@dataclass
class Attention:
    """A call, and what its storage stands for: float64 ``(B, H_kv, tokens, D)``, 0 beyond a row's length."""

    format: str
    query: torch.Tensor
    storage: list[torch.Tensor]
    keys: torch.Tensor
    values: torch.Tensor
    scaled: torch.Tensor  # of the keys what the query's products with their scales are rounded for; 0 where nothing is
    lengths: list[int]
    target: Target
    scaling: float
    largest_scale: float
    mask: torch.Tensor | None = None
    window: int = 0
    softcap: float = 0.0
    sinks: torch.Tensor | None = None
    tickets: torch.Tensor | None = None

    def run(self) -> torch.Tensor:
        poison(*self.query.shape, dtype=self.query.dtype, device=self.target.device)
        op = getattr(self.target.ops, f"attn_decode_{self.format}")
        options = {"window": self.window, "softcap": self.softcap, "sinks": self.sinks}
        if self.tickets is None:  # more than the call needs
            count = self.query.shape[0] * self.keys.shape[1] + 3
            self.tickets = torch.zeros(count, dtype=torch.int32, device=self.query.device)
        out = op(self.query, self.storage, self.mask, self.scaling, tickets=self.tickets, **options)
        assert not bool(self.tickets.any())  # as the next call wants them
        return out

    def rows(self, rows: slice) -> Attention:
        part = copy.copy(self)
        part.lengths, part.storage = self.lengths[rows], [tensor[rows].contiguous() for tensor in self.storage]
        for name in ("query", "keys", "values", "scaled", "mask"):
            if getattr(self, name) is not None:
                setattr(part, name, getattr(self, name)[rows].contiguous())
        return part

    def present(self) -> torch.Tensor:
        """Which tokens each row attends to."""
        at = torch.arange(self.keys.shape[2], device=self.query.device)
        stop = torch.tensor(self.lengths, device=self.query.device)[:, None]
        present = at < stop
        if self.window:
            present &= at >= stop - self.window
        if self.mask is not None:
            columns = min(self.mask.shape[1], present.shape[1])
            present[:, :columns] &= self.mask[:, :columns]
            present[:, columns:] = False
        return present

    def float64(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The result, the sum of weight * |value|, and a bound of the weights' relative error."""
        ratio, dim = self.query.shape[1] // self.keys.shape[1], self.query.shape[2]
        k, v, scaled = (x.repeat_interleave(ratio, 1) for x in (self.keys, self.values, self.scaled))
        q = self.query.double().unsqueeze(2) * self.scaling
        scores = (q @ k.mT).squeeze(2)
        # Of products and sums in fp32 (and of tanh), and of a query that was rounded to fp16 with the keys' scales.
        score_error = ((q.abs() @ k.abs().mT).squeeze(2).amax(-1) + self.softcap) * (dim / 16 + 8) * ACCUMULATION
        score_error += (q.abs() @ scaled.abs().mT).squeeze(2).amax(-1) * 2.0**-11
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        scores = scores.masked_fill(~self.present()[:, None], float("-inf"))
        if self.sinks is not None:
            sinks = self.sinks.double()[None, :, None].expand(scores.shape[0], -1, 1)
            weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1).nan_to_num(0.0)
        weights = weights.unsqueeze(2)
        return (weights @ v).squeeze(2), (weights @ v.abs()).squeeze(2), score_error[..., None]

    def check(self, out: torch.Tensor) -> None:
        """Against float64, element by element and as a whole.

        A weight is rounded once: to fp16 where it meets codes (2^-11 of itself, and what is below fp16's range 2^-39 of
        the largest scale, which a code of up to 448 meets), to the model's dtype where it meets values in full
        precision. The score that it comes from is off by the accumulation of its products, which moves the sum of
        weights as much, and the sum over tokens by as many steps as a warp takes.
        """
        exact, magnitude, score_error = self.float64()
        steps = max(self.lengths) / 64 + 80
        rounding = ROUNDING[out.dtype]
        of_weights = 2.0**-11 if self.format == "int8" else max(2.0**-11, rounding)
        relative = of_weights + steps * ACCUMULATION + 2 * score_error
        below = 2.0**-39 * 448 * self.largest_scale * max(self.lengths)
        assert_within(out, exact, relative * magnitude + below + 1.01 * rounding * exact.abs() + 1e-7)
        # Single errors are independent, so they must not add up: the whole stays within one rounding.
        error = (out.double() - exact).norm() / exact.norm().clamp_min(1e-30)
        assert error <= rounding + 2 * float(score_error.max()) + 1e-9, f"relative error {float(error)}"


def _static(rng: torch.Generator, shape: Sequence[int], lengths: list[int], dtype: torch.dtype) -> Any:
    data = torch.randn(*shape, generator=rng).to(dtype)
    exact = data.double()
    for row, length in enumerate(lengths):
        data[row, :, length:] = NAN
    return [data], exact, torch.zeros_like(exact), 1.0


def _int8(rng: torch.Generator, shape: Sequence[int], lengths: list[int], dtype: torch.dtype) -> Any:
    data = torch.randint(-127, 128, shape, generator=rng, dtype=torch.int8)
    scale = ((torch.rand(shape[:3], generator=rng) + 0.2) * 3.0 / 127).half()
    exact = data.double() * scale.double().unsqueeze(-1)
    for row, length in enumerate(lengths):
        data[row, :, length:], scale[row, :, length:] = 127, NAN
    return [data, scale], exact, torch.zeros_like(exact), float(scale.nan_to_num(0).max())


def _fp8(rng: torch.Generator, shape: Sequence[int], lengths: list[int], dtype: torch.dtype) -> Any:
    (batch, heads, capacity, dim), group = shape, 64
    data = (torch.randn(*shape, generator=rng) * 100).clamp(-448, 448).to(FP8)
    scale = 2.0 ** torch.randint(-8, -5, (batch, heads, capacity // group), generator=rng)
    tail = torch.randn(batch, heads, group, dim, generator=rng).to(dtype)
    exact = data.double() * scale.double().repeat_interleave(group, 2).unsqueeze(-1)
    for row, length in enumerate(lengths):
        coded = length // group * group
        exact[row, :, coded:length] = tail[row, :, : length - coded].double()
        data.view(torch.uint8)[row, :, coded:], scale[row, :, coded // group :] = 0x7F, NAN
        tail[row, :, length - coded :] = NAN
    return [data, scale, tail], exact, torch.zeros_like(exact), 1.0


def _int4(
    rng: torch.Generator,
    shape: Sequence[int],
    lengths: list[int],
    dtype: torch.dtype,
    values: bool,
    group: int,
    front: int,
) -> Any:
    (batch, heads, capacity, dim), groups = shape, shape[2] // group
    parts = value_groups(dim)
    kinds = (batch, heads, capacity // 8, dim, 4) if values else (batch, heads, capacity, dim // 2)
    data = torch.randint(0, 256, kinds, generator=rng, dtype=torch.uint8)
    each = (parts, group) if values else (dim,)
    params = torch.randn(batch, heads, groups, 2, *each, generator=rng).half()
    params[:, :, :, 0] = params[:, :, :, 0].abs() / 8
    tail = torch.randn(batch, heads, group, dim, generator=rng).to(dtype)
    sinks = torch.randn(batch, heads, front, dim, generator=rng).to(dtype)
    expand = expand_values if values else expand_keys
    coded_exact, without = expand(data, params).double(), params.clone()
    without[:, :, :, 1] = 0
    coded_scaled = expand(data, without).double()
    exact, scaled = torch.zeros(2, *shape, dtype=torch.float64)
    for row, length in enumerate(lengths):
        first = min(length, front)
        coded = (length - first) // group * group
        end = first + coded
        exact[row, :, :first] = sinks[row, :, :first].double()
        exact[row, :, first:end], scaled[row, :, first:end] = coded_exact[row, :, :coded], coded_scaled[row, :, :coded]
        exact[row, :, end:length] = tail[row, :, : length - end].double()
        data[row, :, coded // 8 if values else coded :], params[row, :, coded // group :] = 255, NAN
        tail[row, :, length - end :], sinks[row, :, first:] = NAN, NAN
    return [data, params, tail, sinks], exact, scaled, max(1.0, float(params[:, :, :, 0].nan_to_num(0).max()))


def make_attention(
    target: Target,
    rng: torch.Generator,
    form: str,
    heads: int,
    kv_heads: int,
    dim: int,
    lengths: Sequence[int],
    dtype: torch.dtype,
    *,
    capacity: int = 0,
    sharpness: float = 1.0,
    group: int = 64,
    front: int = 4,
) -> Attention:
    """Random keys and values of rows of some lengths. group, front: int4's. capacity 0: as little as there can be."""
    lengths, batch = list(lengths), len(lengths)
    unit = {"fp8": 64, "int4": group}.get(form, 16)
    shape = (batch, kv_heads, capacity or max(1, -(-max(lengths) // unit)) * unit, dim)
    if form == "int4":
        k, v = (_int4(rng, shape, lengths, dtype, values, group, front) for values in (False, True))
    else:
        make = {"static": _static, "int8": _int8, "fp8": _fp8}[form]
        k, v = make(rng, shape, lengths, dtype), make(rng, shape, lengths, dtype)
    for row, length in enumerate(lengths):
        k[1][row, :, length:], v[1][row, :, length:] = 0, 0
    counts = torch.tensor(lengths, dtype=torch.int32).unsqueeze(1).expand(batch, kv_heads).contiguous()
    storage = [tensor.to(target.device) for tensor in (*k[0], *v[0], counts)]
    query = (torch.randn(batch, heads, dim, generator=rng) * sharpness).to(dtype).to(target.device)
    exact = (k[1].to(target.device), v[1].to(target.device), k[2].to(target.device))
    return Attention(form, query, storage, *exact, lengths, target, dim**-0.5, v[3])
