"""A mixture's experts in 16 bits on our op, for a module that has transformers' own attributes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from hf_fastpath.heuristics import Experts16Variant, experts16_variant
from hf_fastpath.ops.moe_experts_16bit import moe_experts_16bit
from hf_fastpath.runtime import gpu_properties, is_capturing, require_device


class Experts16(nn.Module):
    """The forward pass of a mixin; the other base class is transformers' SwiGLU experts, which compute on the CPU, keep
    gradients, and take dtypes that differ."""

    gate_up_proj: nn.Parameter  # (E, 2 I, H), gate first
    down_proj: nn.Parameter  # (E, H, I)

    @staticmethod
    def why_not(module: nn.Module) -> str:
        """Why a module of transformers' experts cannot have this forward pass; "" if it can."""
        gate_up, down = module.gate_up_proj, module.down_proj
        assert isinstance(gate_up, torch.Tensor)
        assert isinstance(down, torch.Tensor)
        if gate_up.dtype != down.dtype or gate_up.dtype not in (torch.float16, torch.bfloat16):
            return "whose weights are not in 16 bits"
        if not (gate_up.is_contiguous() and down.is_contiguous()):
            return "whose weights are not contiguous"
        if gate_up.shape[2] % 32 or down.shape[2] % 32:
            return "whose sizes are not multiples of 32"
        if module.act_fn is not F.silu and not isinstance(module.act_fn, nn.SiLU):
            return "whose activation is not SiLU"
        if getattr(module, "_is_expert_parallel", False) or module.num_experts != gate_up.shape[0]:
            return "which are divided among GPUs"
        return ""

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``(M, H)``, the chosen experts and their shares ``(M, top_k)`` to the mixture ``(M, H)``, to which
        ``residual`` is added, if given."""
        weights = (self.gate_up_proj, self.down_proj)
        floats = (hidden_states, top_k_weights, *weights)
        same_dtype = len({tensor.dtype for tensor in floats}) == 1
        wants_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in floats)
        variant = self._variant(hidden_states) if same_dtype and not wants_gradient else Experts16Variant.TRANSFORMERS
        if variant is Experts16Variant.OP:
            residual = None if residual is None else residual.contiguous()
            routes = (top_k_index.contiguous(), top_k_weights.contiguous())
            return moe_experts_16bit(hidden_states.contiguous(), *routes, *weights, residual)
        if variant is Experts16Variant.GROUPED:
            mixture = grouped_experts(hidden_states, top_k_index, top_k_weights, *weights)
        else:
            mixture = super().forward(hidden_states, top_k_index, top_k_weights)
        return mixture if residual is None else residual + mixture

    def keeps_row_bits(self, rows: int) -> bool:
        """Whether up to ``rows`` rows run on our op: see :func:`hf_fastpath.spare_rows.keeps_row_bits`."""
        variant = experts16_variant(self.down_proj.device.type, rows, self.down_proj.dtype)
        return variant is Experts16Variant.OP

    def _variant(self, hidden_states: torch.Tensor) -> Experts16Variant:
        device, capability = hidden_states.device, (9, 0)
        if device.type == "cuda":
            require_device(device)
            properties = gpu_properties(device)
            capability = (properties.major, properties.minor)
        return experts16_variant(
            device.type, hidden_states.shape[0], hidden_states.dtype, capability, is_capturing(device)
        )


def grouped_experts(
    x: torch.Tensor, experts: torch.Tensor, shares: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """The mixture for many rows: torch's grouped products over rows in the order of their experts, as transformers'
    "grouped_mm" computes it and rounds. The arguments are those of :func:`hf_fastpath.ops.moe_experts_16bit`.

    The host waits for nothing where torch has a kernel for these products (bf16, compute capability 9.0 and 10).
    """
    sorted_experts, order = experts.flatten().sort(stable=True)
    numbers = torch.arange(gate_up.shape[0], device=x.device)
    ends = torch.searchsorted(sorted_experts, numbers, right=True, out_int32=True)
    rows = x[order // experts.shape[1]]
    gate, up = F.grouped_mm(rows, gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    products = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
    products = torch.empty_like(products).index_copy_(0, order, products).view(*experts.shape, -1)
    return (products * shares.unsqueeze(-1)).sum(dim=1)
