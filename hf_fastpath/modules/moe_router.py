"""A mixture's router on our op, for a module that has transformers' own attributes."""

from __future__ import annotations

import torch
from torch import nn

from hf_fastpath.ops._library import WITHOUT_KERNEL
from hf_fastpath.ops.moe_router import moe_router


class MoERouter(nn.Module):
    """The forward pass of a mixin; the other base class is transformers' sigmoid router, which keeps gradients."""

    weight: nn.Parameter
    top_k: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    use_expert_bias: bool

    def forward(
        self, hidden_states: torch.Tensor, expert_bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``(M, H)`` to logits ``(M, E)``, shares ``(M, top_k)`` and experts ``(M, top_k)``."""
        if torch.is_grad_enabled() and (hidden_states.requires_grad or self.weight.requires_grad):
            logits, shares, experts = super().forward(hidden_states, expert_bias)
            return logits, shares, experts
        return moe_router(
            hidden_states,
            self.weight,
            expert_bias if self.use_expert_bias else None,
            self.top_k,
            self.norm_topk_prob,
            self.routed_scaling_factor,
            reference=hidden_states.is_cuda and "moe_router" in WITHOUT_KERNEL,
        )
