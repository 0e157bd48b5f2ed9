"""The kinds of layers that can be packed, and plain ones made anew: ``nn.Linear``, transformers' ``Conv1D``, whose
weight is transposed, and the experts of a mixture."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

LINEAR_TYPES: tuple[type[nn.Module], ...] = (nn.Linear, Conv1D)


def in_and_out(linear: Any) -> tuple[int, int]:
    """``in_features, out_features``."""
    return (linear.nx, linear.nf) if isinstance(linear, Conv1D) else (linear.in_features, linear.out_features)


def weight_matrix(linear: Any) -> torch.Tensor:
    """The weight as ``(out_features, in_features)``, contiguous; a Conv1D's is a copy."""
    return linear.weight.t().contiguous() if isinstance(linear, Conv1D) else linear.weight


def plain_linear(kind: type[nn.Module], weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    """A layer of ``kind`` (one of LINEAR_TYPES) from a weight ``(out_features, in_features)``."""
    out_features, in_features = weight.shape
    with torch.device("meta"):
        transposed = issubclass(kind, Conv1D)
        linear = Conv1D(out_features, in_features) if transposed else nn.Linear(in_features, out_features)
    linear.weight = nn.Parameter(weight.t().contiguous() if transposed else weight)
    linear.register_parameter("bias", None if bias is None else nn.Parameter(bias))
    return linear


def plain_experts(kind: type[Any], config: Any, gate_up: torch.Tensor, down: torch.Tensor) -> nn.Module:
    """Experts of ``kind`` from float weights ``(E, 2 I, H)`` and ``(E, H, I)``."""
    with torch.device("meta"):
        experts: nn.Module = kind(config)
    experts.gate_up_proj, experts.down_proj = nn.Parameter(gate_up), nn.Parameter(down)
    return experts
