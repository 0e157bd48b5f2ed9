"""A linear layer whose weight is stored as int8, one scale an output: a language-model head that costs next to nothing
in accuracy."""

from __future__ import annotations

import torch
from torch import nn

from hf_fastpath import heuristics, packing, packing_int8
from hf_fastpath.heuristics import W8A16Variant
from hf_fastpath.modules.packed_linear import PackedLinear
from hf_fastpath.ops.w8a16_dequantize import w8a16_dequantize
from hf_fastpath.ops.w8a16_linear import w8a16_linear
from hf_fastpath.runtime import require_device


class W8A16Linear(PackedLinear):
    """``W[n, k] = q[n, k] * scale[n]`` (layout: :mod:`hf_fastpath.packing_int8`).

    The CPU's layout is the plain ``(N, K)`` int8 matrix of ``torch._weight_int8pack_mm``, which multiplies in the
    input's dtype (scales are rounded to it) and accumulates in fp32.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> None:
        super().__init__(in_features, out_features)
        self.register_buffer("qweight", qweight)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)

    @classmethod
    def from_quantized(cls, q: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> W8A16Linear:
        """Packs int8 ``(N, K)`` with 16-bit scales ``(N,)``."""
        out_features, in_features = q.shape
        bias = None if bias is None else bias.detach().clone()
        return cls(in_features, out_features, qweight=packing_int8.pack_int8(q), scales=scales, bias=bias)

    @classmethod
    def empty(cls, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype) -> W8A16Linear:
        """A layer on the meta device, for a checkpoint to be loaded into. ``dtype``: of scales and bias."""
        tiles = (packing.ceil_div(out_features, packing.TILE_ROWS), in_features // packing_int8.TILE_COLS, 32, 16)
        return cls(
            in_features,
            out_features,
            qweight=torch.empty(tiles, dtype=torch.int8, device="meta"),
            scales=torch.empty(out_features, dtype=dtype, device="meta"),
            bias=torch.empty(out_features, dtype=dtype, device="meta") if bias else None,
        )

    @property
    def layout(self) -> str:
        return "int8 rows"

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        variant = heuristics.w8a16_variant(rows.device.type, rows.shape[0], self.reference)
        if variant is W8A16Variant.CPU_INT8PACK:
            return self._multiply_on_cpu(rows)
        reference = variant is W8A16Variant.REFERENCE
        if not reference:
            require_device(rows.device)
        if reference or variant is W8A16Variant.CUDA_KERNEL:
            return w8a16_linear(rows, self.qweight, self.scales, self.bias, self.out_features, reference=reference)
        weight = w8a16_dequantize(self.qweight, self.scales, self.out_features)
        return nn.functional.linear(rows, weight, self.bias)

    def _multiply_on_cpu(self, rows: torch.Tensor) -> torch.Tensor:
        if self.cpu_layout is None:
            self.hold_cpu_layout((packing_int8.unpack_int8(self.qweight, self.out_features).contiguous(),))
        assert self.cpu_layout is not None
        (q,) = self.cpu_layout
        out = torch.ops.aten._weight_int8pack_mm(rows.contiguous(), q, self.scales.to(rows.dtype))
        return out if self.bias is None else (out + self.bias).to(rows.dtype)

    def canonical_qweight(self) -> torch.Tensor:
        return self.qweight if self.cpu_layout is None else packing_int8.pack_int8(self.cpu_layout[0])

    def dequantized_weight(self) -> torch.Tensor:
        qweight = self.canonical_qweight()
        if qweight.is_cuda and not self.reference:
            require_device(qweight.device)
        return w8a16_dequantize(qweight, self.scales, self.out_features, reference=self.reference)
