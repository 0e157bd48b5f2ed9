"""Products with packed int4 weights."""

from __future__ import annotations

import torch
from emulator import IN_OUT, OUTPUT

from emulated.base import EmulatedKernels, inputs_of


class EmulatedW4A16(EmulatedKernels):
    """See :class:`emulated.EmulatedOps`."""

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
            **inputs_of(x=x, qweight=qweight, scales=scales, zeros=zeros, bias=bias, norm_weight=norm_weight),
            **inputs_of(conv_weight=conv_weight, conv_bias=conv_bias, mask=mask),
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
            **inputs_of(x=x, qweight=qweight, scales=scales, zeros=zeros, bias=bias),
            **inputs_of(norm_weight=norm_weight, residual=residual),
            normalized=(normalized, OUTPUT),
            y=(y, OUTPUT),
        )
        return y

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
            **inputs_of(x=x, qweight=qweight, scales=scales, zeros=zeros, bias=bias, residual=residual),
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
            **inputs_of(x=x, qweight=qweight, scales=scales, zeros=zeros, bias=bias),
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
            **inputs_of(qweight=qweight, scales=scales, zeros=zeros),
            out=(out, OUTPUT),
        )
        return out
