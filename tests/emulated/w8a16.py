"""Products with int8 weights."""

from __future__ import annotations

import torch
from emulator import OUTPUT

from emulated.base import EmulatedKernels, inputs_of


class EmulatedW8A16(EmulatedKernels):
    """See :class:`emulated.EmulatedOps`."""

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
            **inputs_of(x=x, qweight=qweight, scales=scales, bias=bias),
            y=(y, OUTPUT),
        )
        return y

    def w8a16_dequantize(self, qweight: torch.Tensor, scales: torch.Tensor, out_features: int) -> torch.Tensor:
        out = scales.new_empty(out_features, qweight.shape[1] * 32)
        self._library.call(
            "emulated_w8a16_dequantize",
            *(qweight, scales, out, *out.shape, scales.dtype is torch.bfloat16),
            **inputs_of(qweight=qweight, scales=scales),
            out=(out, OUTPUT),
        )
        return out
