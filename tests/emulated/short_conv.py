"""Short convolutions."""

from __future__ import annotations

import torch
from emulator import IN_OUT, OUTPUT

from emulated.base import EmulatedKernels, inputs_of


class EmulatedShortConv(EmulatedKernels):
    """See :class:`emulated.EmulatedOps`."""

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
            **inputs_of(bcx=bcx, weight=weight, bias=bias, mask=mask),
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
