"""Products with 16-bit weights."""

from __future__ import annotations

import torch
from emulator import OUTPUT

from emulated.base import EmulatedKernels, inputs_of


class EmulatedLinear16(EmulatedKernels):
    """See :class:`emulated.EmulatedOps`."""

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
            **inputs_of(x=x, weight=weight, bias=bias, norm_weight=norm_weight, residual=residual),
            normalized=(normalized, OUTPUT),
            y=(y, OUTPUT),
        )
        return y
