"""A mixture's router on our op, for a module that has transformers' own attributes."""

from __future__ import annotations

import torch
from torch import nn

from hf_fastpath.heuristics import moe_router_supports
from hf_fastpath.ops.moe_router import moe_norm_router, moe_router


class MoERouter(nn.Module):
    """The forward pass of a mixin; the other base class is transformers' sigmoid router, which keeps gradients."""

    on_kernel = False  # on CUDA: the kernel, which adds in another order than stock's product

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
        arguments, reference = self._arguments(hidden_states, expert_bias)
        return moe_router(hidden_states, *arguments, reference=reference)

    def behind_norm(
        self,
        hidden_states: torch.Tensor,
        norm_weight: torch.Tensor,
        norm_eps: float,
        expert_bias: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``(M, H)`` to its RMSNorm, alike, and that one's shares and experts, ``(M, top_k)``. Without gradients."""
        arguments, reference = self._arguments(hidden_states, expert_bias)
        reference = reference or (hidden_states.is_cuda and norm_weight.dtype != hidden_states.dtype)
        return moe_norm_router(hidden_states, norm_weight, norm_eps, *arguments, reference=reference)

    def keeps_row_bits(self, rows: int) -> bool:
        """Whether it runs on our op, for any number of rows: see :func:`hf_fastpath.spare_rows.keeps_row_bits`."""
        count, hidden = self.weight.shape
        return self.on_kernel and moe_router_supports(self.weight.dtype, hidden, count, self.top_k)

    def _arguments(
        self, hidden_states: torch.Tensor, expert_bias: torch.Tensor | None
    ) -> tuple[tuple[torch.Tensor, torch.Tensor | None, int, bool, float], bool]:
        """What the op wants beside x, and whether it is the reference implementation that has to run."""
        fits = hidden_states.dtype == self.weight.dtype and moe_router_supports(
            hidden_states.dtype, hidden_states.shape[1], self.weight.shape[0], self.top_k
        )
        plain = hidden_states.is_cuda and not (self.on_kernel and fits)
        bias = expert_bias if self.use_expert_bias else None
        if bias is not None and hidden_states.is_cuda and not plain:
            bias = bias.float()  # which it is, unless the whole model was cast
        return (self.weight, bias, self.top_k, self.norm_topk_prob, self.routed_scaling_factor), plain
