"""Linear layers that read one input, as one weight: one product in the place of several.

A weight is packed int4 (:class:`Int4Weight`) or in 16 bits (:class:`PlainWeight`); both have the products that a
decoder layer's step is made of, x being ``(M, K)`` and results ``(M, N)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import linear

from hf_fastpath import heuristics
from hf_fastpath.heuristics import W4A16Variant
from hf_fastpath.modules.w4a16_linear import W4A16Linear, gemm_form, int4_product, variant_for
from hf_fastpath.ops.linear_16bit import linear_16bit
from hf_fastpath.ops.linear_16bit_swiglu import linear_16bit_swiglu
from hf_fastpath.ops.rms_norm import rms_norm
from hf_fastpath.ops.swiglu import swiglu
from hf_fastpath.ops.w4a16_gemm_swiglu import w4a16_gemm_swiglu
from hf_fastpath.ops.w4a16_linear import MAX_ROWS
from hf_fastpath.ops.w4a16_linear_fused import w4a16_linear_fused
from hf_fastpath.ops.w4a16_swiglu import w4a16_swiglu
from hf_fastpath.packing import TILE_ROWS
from hf_fastpath.runtime import gpu_properties

PER_ROW = ("qweight", "scales", "zeros", "bias")  # the tensors of a packed layer whose first dimension is its rows
PLAIN_PER_ROW = ("weight", "bias")


class Norm(NamedTuple):
    """An RMSNorm."""

    weight: torch.Tensor
    eps: float


class MergedWeight(ABC):
    """What a step wants of a weight, for any number of rows; in operations of their own where a kernel has no more."""

    bias: torch.Tensor | None
    out_features: int

    @abstractmethod
    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """``x @ W.T + bias``."""

    def fuses(self, rows: int) -> bool:
        """Whether a product of so many rows takes in the norm before it, the residual behind it and SwiGLU."""
        return False

    def product(self, x: torch.Tensor, norm: Norm | None, residual: torch.Tensor | None) -> torch.Tensor:
        """``residual + RMSNorm(x) @ W.T + bias``."""
        y = self.multiply(x if norm is None else rms_norm(x, *norm))
        return y if residual is None else y.add_(residual)

    def swiglu(self, x: torch.Tensor, norm: Norm | None) -> torch.Tensor:
        """``(M, N / 2)``: SwiGLU of ``RMSNorm(x) @ W.T + bias``."""
        return swiglu(self.product(x, norm, None))

    def add_to(self, total: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """``total + x @ W.T + bias``; total is the caller's no more."""
        return total.add_(self.multiply(x))


@dataclass(frozen=True)
class Int4Weight(MergedWeight):
    """A packed weight as the ops take it (:mod:`hf_fastpath.packing`), of one layer or of several, row behind row."""

    qweight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    bias: torch.Tensor | None
    out_features: int
    group_size: int

    def multiply(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return int4_product(x, *self.packed, self.out_features, self.group_size, variant_for(x), residual)

    def fuses(self, rows: int) -> bool:
        return rows <= MAX_ROWS

    def product(self, x: torch.Tensor, norm: Norm | None, residual: torch.Tensor | None) -> torch.Tensor:
        if not self.fuses(x.shape[0]):
            return self.multiply(x if norm is None else rms_norm(x, *norm), residual)
        weight, eps = norm or (None, 0.0)
        return w4a16_linear_fused(x, *self.packed, weight, eps, residual, self.out_features, self.group_size)

    def swiglu(self, x: torch.Tensor, norm: Norm | None) -> torch.Tensor:
        intermediate = self.out_features // 2
        if self.fuses(x.shape[0]):
            weight, eps = norm or (None, 0.0)
            return w4a16_swiglu(x, *self.packed, weight, eps, intermediate, self.group_size)
        if variant_for(x) is W4A16Variant.CUDA_GEMM:
            form = gemm_form(x, self.out_features)
            if heuristics.w4a16_gemm_swiglu_has(form):
                normalized = x if norm is None else rms_norm(x, *norm)
                return w4a16_gemm_swiglu(normalized, *self.packed, intermediate, self.group_size, form)
        return super().swiglu(x, norm)

    def add_to(self, total: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.product(x, None, total)

    @property
    def packed(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """What an op's arguments begin with behind x."""
        return self.qweight, self.scales, self.zeros, self.bias


@dataclass(frozen=True)
class PlainWeight(MergedWeight):
    """A weight ``(N, K)`` in the model's dtype, of one layer or of several, row behind row."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    @property
    def out_features(self) -> int:  # type: ignore[override]
        return self.weight.shape[0]

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)

    def fuses(self, rows: int) -> bool:
        w, capability = self.weight, (0, 0)
        if w.is_cuda:
            gpu = gpu_properties(w.device)
            capability = (gpu.major, gpu.minor)
        supported = heuristics.linear_16bit_supports(w.device.type, w.dtype, rows, w.shape[1], capability)
        return supported and w.data_ptr() % 16 == 0

    def product(self, x: torch.Tensor, norm: Norm | None, residual: torch.Tensor | None) -> torch.Tensor:
        if not self.fuses(x.shape[0]):
            return super().product(x, norm, residual)
        weight, eps = norm or (None, 0.0)
        return linear_16bit(x, self.weight, self.bias, weight, eps, residual)

    def swiglu(self, x: torch.Tensor, norm: Norm | None) -> torch.Tensor:
        if not self.fuses(x.shape[0]):
            return super().swiglu(x, norm)
        weight, eps = norm or (None, 0.0)
        return linear_16bit_swiglu(x, self.weight, self.bias, weight, eps)

    def add_to(self, total: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if self.fuses(x.shape[0]):
            return self.product(x, None, total)
        if self.bias is not None:
            return super().add_to(total, x)
        return total.addmm_(x, self.weight.t())  # cuBLAS adds before it rounds


def why_not_merged(layers: Sequence[Any]) -> str:
    """Why layers cannot be one product; "" when they can."""
    if all(type(layer) is nn.Linear for layer in layers):
        return _why_not_plain(layers)
    int4 = [layer for layer in layers if isinstance(layer, W4A16Linear)]
    if len(int4) < len(layers):
        return "linear layers of one input are neither all int4 nor all plain"
    kinds = {(x.in_features, x.group_size, x.zeros is None, x.bias is None, x.scales.dtype) for x in int4}
    if len(kinds) > 1:
        return "layers of one input differ in group size, zero points, bias or dtype"
    if any(layer.input_order is not None for layer in int4):
        return "columns of a weight are in an order of their own"
    if any(layer.out_features % TILE_ROWS for layer in int4):
        return f"an output size is not a multiple of {TILE_ROWS}"
    return ""


def _why_not_plain(layers: Sequence[Any]) -> str:
    weights = [x for layer in layers for x in (layer.weight, layer.bias) if x is not None]
    if any(type(weight) is not nn.Parameter or not weight.is_contiguous() for weight in weights):
        return "a weight is no plain parameter"
    if len({(x.in_features, x.bias is None, x.weight.dtype, x.weight.requires_grad) for x in layers}) > 1:
        return "layers of one input differ in bias, dtype or gradients"
    # What the kernels around the products want of their rows.
    odd = any(layer.in_features % 8 or layer.out_features % 8 for layer in layers)
    return "a size is not a multiple of 8" if odd else ""


@torch.inference_mode(False)
@torch.no_grad()
def merge(layers: Sequence[Any]) -> MergedWeight:
    """The layers as one weight. Their own tensors become views of it, so that it takes no memory of its own; while it
    is made, that of the layers once more.

    Args:
        layers: such that :func:`why_not_merged` has nothing against them.
    """
    if not isinstance(layers[0], W4A16Linear):
        return PlainWeight(*(_together(layers, name, _set_parameter) for name in PLAIN_PER_ROW))  # type: ignore[arg-type]
    for layer in layers:
        layer.to_canonical_layout()
    whole = {name: _together(layers, name, setattr) for name in PER_ROW}
    rows = sum(layer.out_features for layer in layers)
    return Int4Weight(**whole, out_features=rows, group_size=layers[0].group_size)  # type: ignore[arg-type]


def _together(layers: Sequence[Any], name: str, put: Any) -> torch.Tensor | None:
    parts = [getattr(layer, name) for layer in layers]
    if len(parts) == 1 or parts[0] is None:
        return None if parts[0] is None else parts[0].detach()
    whole, start = torch.cat(parts), 0
    for layer, part in zip(layers, parts, strict=True):
        put(layer, name, whole[start : start + part.shape[0]])
        start += part.shape[0]
    return whole


def _set_parameter(layer: nn.Linear, name: str, value: torch.Tensor) -> None:
    """The parameter stays the object that it is: somebody may hold it."""
    getattr(layer, name).data = value


def places(layers: Sequence[Any]) -> list[tuple[torch.Tensor, int]]:
    """The parameters of plain layers, and where they are: moving them leaves them the objects that they were."""
    plain = [layer for layer in layers if isinstance(layer, nn.Linear)]
    return [(x, x.data_ptr()) for layer in plain for x in (layer.weight, layer.bias) if x is not None]


@torch.inference_mode(False)
@torch.no_grad()
def separate(layers: Sequence[Any]) -> None:
    """Undoes :func:`merge` of plain layers: each has memory of its own again."""
    for layer in layers:
        if not isinstance(layer, nn.Linear):
            continue
        for parameter in filter(lambda x: x is not None, (layer.weight, layer.bias)):
            if parameter.untyped_storage().nbytes() > parameter.nbytes:
                parameter.data = parameter.detach().clone()
