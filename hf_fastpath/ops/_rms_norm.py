"""RMSNorm (Zhang and Sennrich, 2019), as the references of fused ops compute it."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Over the last dimension, rounding where transformers' LlamaRMSNorm does: normalized in float32, rounded to
    ``x.dtype``, multiplied by the weight in that dtype."""
    wide = x.float()
    normalized = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normalized.to(x.dtype)
