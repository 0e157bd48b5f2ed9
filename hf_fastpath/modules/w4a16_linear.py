"""A linear layer whose weight is stored as int4 groups."""

from __future__ import annotations

import torch
from torch import nn

from hf_fastpath import heuristics, packing
from hf_fastpath.heuristics import W4A16Variant
from hf_fastpath.modules.packed_linear import PackedLinear
from hf_fastpath.ops.w4a16_dequantize import w4a16_dequantize
from hf_fastpath.ops.w4a16_gemm import w4a16_gemm
from hf_fastpath.ops.w4a16_linear import w4a16_linear
from hf_fastpath.quantize import GroupQuantized
from hf_fastpath.runtime import gpu_properties, require_device

_IDENTITY_ROWS = 512


def variant_for(x: torch.Tensor, reference: bool = False) -> W4A16Variant:
    """How a product of x ``(M, K)`` is computed where it is."""
    capability = (0, 0)
    if x.is_cuda:
        gpu = gpu_properties(x.device)
        capability = (gpu.major, gpu.minor)
    return heuristics.w4a16_variant(x.device.type, x.shape[0], reference, capability)


def gemm_form(x: torch.Tensor, out_features: int) -> int:
    """The variant of w4a16_gemm for x ``(M, K)`` on its GPU."""
    gpu = gpu_properties(x.device)
    capability, sm_count = (gpu.major, gpu.minor), gpu.multi_processor_count
    return heuristics.w4a16_gemm_variant(x.shape[0], out_features, x.shape[1], capability, sm_count)


def int4_product(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
    group_size: int,
    variant: W4A16Variant,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """``(M, N)`` for x ``(M, K)``, any M that the variant takes, and a weight in the documented layout.

    residual: ``(M, N)``, contiguous, added before the one rounding by ``CUDA_GEMM``, and behind it by the others.
    """
    n, g = out_features, group_size
    if variant is W4A16Variant.CUDA_GEMM:
        return w4a16_gemm(x, qweight, scales, zeros, bias, n, g, gemm_form(x, n), residual)
    if variant is W4A16Variant.CUDA_DEQUANTIZE:
        y = nn.functional.linear(x, w4a16_dequantize(qweight, scales, zeros, x.shape[1], n, g), bias)
    else:
        y = w4a16_linear(x, qweight, scales, zeros, bias, n, g, reference=variant is W4A16Variant.REFERENCE)
    return y if residual is None else y.add_(residual)


class W4A16Linear(PackedLinear):
    """``W[n, k] = (q[n, k] - zero[n, k // g]) * scale[n, k // g]`` (layout: :mod:`hf_fastpath.packing`).

    The CPU's layout is that of torch's own int4 product, which multiplies bf16 activations and accumulates in fp32:
    fp16 and fp32 inputs are rounded to bf16 for it, and so is ``(8 - zero) * scale``.

    ``input_order``, int32 ``(in_features,)`` or None: the stored column k multiplies ``x[..., input_order[k]]``
    (checkpoints whose groups are not neighbouring columns, GPTQ's ``desc_act``).
    """

    zeros: torch.Tensor | None
    input_order: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_size: int,
        *,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        bias: torch.Tensor | None,
        input_order: torch.Tensor | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self.group_size = group_size
        self.register_buffer("qweight", qweight)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)
        self.register_buffer("bias", bias)
        self.register_buffer("input_order", input_order)

    @classmethod
    def from_quantized(
        cls, quantized: GroupQuantized, bias: torch.Tensor | None, input_order: torch.Tensor | None = None
    ) -> W4A16Linear:
        """Packs a quantized ``(N, K)`` weight, its columns in ``input_order`` where that is given."""
        out_features, in_features = quantized.q.shape
        zeros = quantized.zero
        return cls(
            in_features,
            out_features,
            quantized.group_size,
            qweight=packing.pack_int4(quantized.q),
            scales=packing.pack_per_group(quantized.scale, 0.0),
            zeros=None if zeros is None else packing.pack_per_group(zeros, packing.SYMMETRIC_ZERO),
            bias=None if bias is None else bias.detach().clone(),
            input_order=None if input_order is None else input_order.to(torch.int32),
        )

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        group_size: int,
        *,
        zeros: bool,
        bias: bool,
        input_order: bool = False,
        dtype: torch.dtype,
    ) -> W4A16Linear:
        """A layer on the meta device, for a checkpoint to be loaded into. ``dtype``: of scales and bias."""
        rows = packing.ceil_div(out_features, packing.TILE_ROWS)
        per_group = (rows, in_features // group_size, packing.TILE_ROWS)
        tiles = (rows, packing.ceil_div(in_features, packing.TILE_COLS), 32, 4)
        return cls(
            in_features,
            out_features,
            group_size,
            qweight=torch.empty(tiles, dtype=torch.int32, device="meta"),
            scales=torch.empty(per_group, dtype=dtype, device="meta"),
            zeros=torch.empty(per_group, dtype=torch.uint8, device="meta") if zeros else None,
            bias=torch.empty(out_features, dtype=dtype, device="meta") if bias else None,
            input_order=torch.empty(in_features, dtype=torch.int32, device="meta") if input_order else None,
        )

    @property
    def layout(self) -> str:
        return f"int4 g{self.group_size}" + ("" if self.zeros is None else " + zeros")

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        if self.input_order is not None:
            rows = rows.index_select(1, self.input_order)
        variant = variant_for(rows, self.reference)
        if variant is W4A16Variant.CPU_INT4PACK:
            return self._multiply_on_cpu(rows)
        if variant is not W4A16Variant.REFERENCE:
            require_device(rows.device)
        weight = (self.qweight, self.scales, self.zeros, self.bias)
        return int4_product(rows, *weight, self.out_features, self.group_size, variant)

    def _multiply_on_cpu(self, x: torch.Tensor) -> torch.Tensor:
        if self.cpu_layout is None:
            self.hold_cpu_layout(self._make_cpu_layout())
        assert self.cpu_layout is not None
        cpu_qweight, scales_and_zeros = self.cpu_layout
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.to(torch.bfloat16).contiguous(), cpu_qweight, self.group_size, scales_and_zeros
        )
        out = out[:, : self.out_features]
        return out.to(x.dtype) if self.bias is None else (out + self.bias).to(x.dtype)

    def _make_cpu_layout(self) -> tuple[torch.Tensor, ...]:
        """The weight in torch's layout, which differs from one CPU to another."""
        padded_rows = self.qweight.shape[0] * packing.TILE_ROWS
        q = packing.unpack_int4(self.qweight, padded_rows, self.in_features)
        cpu_qweight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.to(torch.int32), 2)
        scale = packing.unpack_per_group(self.scales, padded_rows).float()
        # torch's form is (q - 8) * scale + zero.
        zero = torch.zeros_like(scale)
        if self.zeros is not None:
            zero = (packing.SYMMETRIC_ZERO - packing.unpack_per_group(self.zeros, padded_rows).float()) * scale
        scales_and_zeros = torch.stack((scale, zero), dim=-1).transpose(0, 1).to(torch.bfloat16).contiguous()
        return cpu_qweight, scales_and_zeros

    def canonical_qweight(self) -> torch.Tensor:
        if self.cpu_layout is None:
            return self.qweight
        cpu_qweight, scales_and_zeros = self.cpu_layout
        # Multiplying the identity with scale 1 and zero 0 gives q - 8, exactly; a band of it at a time, to save memory.
        ones = torch.ones_like(scales_and_zeros)
        ones[..., 1] = 0
        columns = []
        for first in range(0, self.in_features, _IDENTITY_ROWS):
            count = min(_IDENTITY_ROWS, self.in_features - first)
            identity = torch.zeros(count, self.in_features, dtype=torch.bfloat16)
            identity[:, first : first + count].fill_diagonal_(1)
            q = torch.ops.aten._weight_int4pack_mm_for_cpu(identity, cpu_qweight, self.group_size, ones)
            columns.append((q.t() + packing.SYMMETRIC_ZERO).to(torch.uint8))
        return packing.pack_int4(torch.cat(columns, dim=1))

    def dequantized_weight(self) -> torch.Tensor:
        qweight, n, k = self.canonical_qweight(), self.out_features, self.in_features
        if qweight.is_cuda and not self.reference:
            require_device(qweight.device)
        weight = w4a16_dequantize(qweight, self.scales, self.zeros, k, n, self.group_size, reference=self.reference)
        return weight if self.input_order is None else weight[:, self.input_order.argsort()]
