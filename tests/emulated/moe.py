"""Mixtures of experts."""

from __future__ import annotations

from typing import Any

import torch
from emulator import OUTPUT

from emulated.base import EmulatedKernels, inputs_of


class EmulatedMoE(EmulatedKernels):
    """See :class:`emulated.EmulatedOps`."""

    def moe_router(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        expert_bias: torch.Tensor | None,
        top_k: int,
        normalize: bool,
        scaling: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self._moe_router(x, None, 0.0, None, weight, expert_bias, top_k, normalize, scaling)

    def moe_norm_router(
        self, x: torch.Tensor, norm_weight: torch.Tensor, norm_eps: float, *router: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        normalized = torch.empty_like(x)
        _, shares, experts = self._moe_router(x, norm_weight, norm_eps, normalized, *router)
        return normalized, shares, experts

    def _moe_router(
        self,
        x: torch.Tensor,
        norm_weight: torch.Tensor | None,
        norm_eps: float,
        normalized: torch.Tensor | None,
        weight: torch.Tensor,
        expert_bias: torch.Tensor | None,
        top_k: int,
        normalize: bool,
        scaling: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        (rows, hidden), count = x.shape, weight.shape[0]
        logits, shares = x.new_empty(rows, count), x.new_empty(rows, top_k)
        experts = torch.empty(rows, top_k, dtype=torch.int64)
        self._library.call(
            "emulated_moe_router",
            *(x, weight, expert_bias, logits, shares, experts, rows, hidden, count, top_k, normalize, float(scaling)),
            *(norm_weight, float(norm_eps), normalized, x.dtype is torch.bfloat16, self.sm_count),
            **inputs_of(x=x, weight=weight, expert_bias=expert_bias, norm_weight=norm_weight),
            normalized=(normalized, OUTPUT),
            logits=(logits, OUTPUT),
            shares=(shares, OUTPUT),
            experts=(experts, OUTPUT),
        )
        return logits, shares, experts

    def moe_experts(
        self,
        x: torch.Tensor,
        experts: torch.Tensor,
        shares: torch.Tensor,
        gate_up_qweight: torch.Tensor,
        gate_up_scales: torch.Tensor,
        gate_up_zeros: torch.Tensor | None,
        down_qweight: torch.Tensor,
        down_scales: torch.Tensor,
        down_zeros: torch.Tensor | None,
        intermediate_size: int,
        gate_up_group_size: int,
        down_group_size: int,
        variant: int,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        (rows, hidden), top_k, count = x.shape, experts.shape[1], gate_up_qweight.shape[0]
        y = torch.empty_like(x)

        def call(workspace: torch.Tensor | None, size: torch.Tensor | None) -> None:
            self._library.call(
                "emulated_moe_experts",
                *(x, experts, shares, gate_up_qweight, gate_up_scales, gate_up_zeros, gate_up_group_size),
                *(down_qweight, down_scales, down_zeros, down_group_size, residual, workspace, y),
                *(rows, top_k, count, hidden, intermediate_size, variant, x.dtype is torch.bfloat16, self.sm_count),
                size,
                **inputs_of(x=x, experts=experts, shares=shares, residual=residual),
                **inputs_of(
                    gate_up_qweight=gate_up_qweight, gate_up_scales=gate_up_scales, gate_up_zeros=gate_up_zeros
                ),
                **inputs_of(down_qweight=down_qweight, down_scales=down_scales, down_zeros=down_zeros),
                workspace=(workspace, OUTPUT),
                y=(y, OUTPUT),
            )

        size = torch.tensor([2 * rows * top_k * intermediate_size])
        if variant:
            call(None, size)
        call(torch.empty(int(size), dtype=torch.uint8), None)
        return y

    def moe_experts_16bit(
        self,
        x: torch.Tensor,
        experts: torch.Tensor,
        shares: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        (rows, hidden), top_k, (count, _, inner) = x.shape, experts.shape[1], down.shape
        workspace, y = x.new_empty(rows * top_k, inner), torch.empty_like(x)
        self._library.call(
            "emulated_moe_experts_16bit",
            *(x, experts, shares, gate_up, down, residual, workspace, y, rows, top_k, count, hidden, inner),
            *(x.dtype is torch.bfloat16, self.sm_count),
            **inputs_of(x=x, experts=experts, shares=shares, gate_up=gate_up, down=down, residual=residual),
            workspace=(workspace, OUTPUT),
            y=(y, OUTPUT),
        )
        return y
