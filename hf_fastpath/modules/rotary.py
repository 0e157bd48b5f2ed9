"""The angles of rotary embeddings: one kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hf_fastpath import heuristics
from hf_fastpath.ops.rope_angles import rope_angles
from hf_fastpath.runtime import require_device

# How transformers makes frequencies (``rope_type``) that stay what they are, whatever the positions.
FIXED_FREQUENCIES = ("default", "linear", "llama3", "yarn")


class RotaryAngles(nn.Module):
    """The forward pass of a mixin; the other base class is a rotary embedding of transformers', which does what is not
    on a GPU without gradients. The bits are the same."""

    inv_freq: Any  # a tensor of D_rot / 2, whose class differs between versions of transformers
    attention_scaling: float

    @staticmethod
    def why_not(module: Any) -> str:
        """Why a rotary embedding is not run so; "" when it is."""
        if module.rope_type in FIXED_FREQUENCIES:
            return ""
        return f"whose frequencies ({module.rope_type}) may depend on the positions"

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        """Cosine and sine ``(B, T, D_rot)`` in x's dtype, of positions ``(B, T)``."""
        if not self._takes(x, position_ids):
            return super().forward(x, position_ids)
        require_device(x.device)
        return rope_angles(position_ids.contiguous(), self.inv_freq, float(self.attention_scaling), x)

    def _takes(self, x: torch.Tensor, positions: torch.Tensor) -> bool:
        """A compiler makes one kernel of transformers' operations, too."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return False
        frequencies = self.inv_freq
        return (
            heuristics.rope_angles_supports(x.device.type, x.dtype)
            and positions.dim() == 2
            and positions.dtype is torch.int64
            and positions.device == frequencies.device == x.device
            and frequencies.dtype is torch.float32  # not if the whole model was converted
            and frequencies.is_contiguous()
        )
