"""LFM2's short convolution on our ops, for a module that has transformers' own attributes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hf_fastpath.caches.conv_state import ConvStateLayer
from hf_fastpath.ops.short_conv_prefill import short_conv_prefill
from hf_fastpath.ops.short_conv_step import short_conv_step


class ShortConv(nn.Module):
    """The forward pass of a mixin; the other base class is transformers' module, which does what this one does not.

    With a cache of ours: padding never gets into the state, whatever biases it meets and however the prompt is cut into
    chunks, and the state is changed in place. Any other cache, gradients, packed sequences and candidates that may be
    taken back (assisted decoding) are transformers' own business.
    """

    conv: nn.Conv1d
    in_proj: Any  # a linear layer, packed or not
    out_proj: Any
    layer_idx: int

    def forward(
        self,
        hidden_states: torch.Tensor,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """``(batch, T, hidden_size)`` to the same. attention_mask: ``(batch, T)``, what transformers passes."""
        layer = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        ours = isinstance(layer, ConvStateLayer) and not layer.record_past and kwargs.get("seq_idx") is None
        if not ours or (hidden_states.requires_grad and torch.is_grad_enabled()):
            return super().forward(
                hidden_states, past_key_values=past_key_values, attention_mask=attention_mask, **kwargs
            )
        assert isinstance(layer, ConvStateLayer)
        weight, bias = self.conv.weight.squeeze(1), self.conv.bias
        bcx = self.in_proj(hidden_states)
        state = layer.ready((bcx.shape[0], *weight.shape), bcx)
        plain = not layer.in_kernel or weight.dtype != bcx.dtype  # which autocast makes
        if bcx.shape[1] == 1:
            out = short_conv_step(bcx[:, 0], state, weight, bias, layer.padding.mask, reference=plain).unsqueeze(1)
        else:
            mask = None if attention_mask is None else attention_mask.bool()
            out = short_conv_prefill(bcx, state, weight, bias, mask, reference=plain)
        return self.out_proj(out)
