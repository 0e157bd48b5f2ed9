"""The experts of a mixture, with their weights stored as int4 groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hf_fastpath import packing
from hf_fastpath.heuristics import MOE_FEW_ROWS, MoEVariant, moe_experts_variant, moe_variant
from hf_fastpath.ops.moe_experts import expert_by_expert, moe_experts
from hf_fastpath.ops.w4a16_dequantize import w4a16_dequantize
from hf_fastpath.quantize import GroupQuantized
from hf_fastpath.runtime import gpu_properties, require_device


class PackedStack(nn.Module):
    """E weights of one shape ``(N, K)`` in the layout of :mod:`hf_fastpath.packing`, in a new first dimension."""

    qweight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None

    def __init__(
        self, shape: tuple[int, int], group_size: int, qweight: torch.Tensor, scales: torch.Tensor, zeros: Any
    ) -> None:
        super().__init__()
        self.shape, self.group_size = shape, group_size
        self.register_buffer("qweight", qweight)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)

    @classmethod
    def from_quantized(cls, stack: Sequence[GroupQuantized]) -> PackedStack:
        zeros = [packing.pack_per_group(each.zero, packing.SYMMETRIC_ZERO) for each in stack if each.zero is not None]
        return cls(
            (stack[0].q.shape[0], stack[0].q.shape[1]),
            stack[0].group_size,
            torch.stack([packing.pack_int4(each.q) for each in stack]),
            torch.stack([packing.pack_per_group(each.scale, 0.0) for each in stack]),
            torch.stack(zeros) if zeros else None,
        )

    @classmethod
    def empty(cls, count: int, shape: tuple[int, int], group_size: int, zeros: bool, dtype: torch.dtype) -> PackedStack:
        """On the meta device, for a checkpoint to be loaded into. ``dtype``: of the scales."""
        rows = packing.ceil_div(shape[0], packing.TILE_ROWS)
        tiles = (count, rows, packing.ceil_div(shape[1], packing.TILE_COLS), 32, 4)
        per_group = (count, rows, shape[1] // group_size, packing.TILE_ROWS)
        return cls(
            shape,
            group_size,
            torch.empty(tiles, dtype=torch.int32, device="meta"),
            torch.empty(per_group, dtype=dtype, device="meta"),
            torch.empty(per_group, dtype=torch.uint8, device="meta") if zeros else None,
        )

    @property
    def count(self) -> int:
        """How many weights there are."""
        return self.qweight.shape[0]

    def expanded(self, expert: int, *, reference: bool) -> torch.Tensor:
        """One float weight ``(N, K)`` in the dtype of ``scales``."""
        zeros = None if self.zeros is None else self.zeros[expert]
        n, k = self.shape
        return w4a16_dequantize(
            self.qweight[expert], self.scales[expert], zeros, k, n, self.group_size, reference=reference
        )


class PackedExperts(nn.Module):
    """``forward(hidden_states, top_k_index, top_k_weights)`` of transformers' experts, on packed weights; and with a
    residual, added before the sum is rounded.

    Inputs in fp16 or bf16, on the CPU also fp32. Where gradients are wanted they flow to the inputs, through expanded
    weights; the packed ones are frozen.
    """

    reference = False  # on CUDA: run the reference implementation

    def __init__(self, gate_up: PackedStack, down: PackedStack) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down

    @classmethod
    def from_quantized(cls, gate_up: Sequence[GroupQuantized], down: Sequence[GroupQuantized]) -> PackedExperts:
        """Packs each expert's ``(2 I, H)`` and ``(H, I)``."""
        return cls(PackedStack.from_quantized(gate_up), PackedStack.from_quantized(down))

    @classmethod
    def empty(
        cls, count: int, hidden: int, intermediate: int, groups: Sequence[int], *, zeros: bool, dtype: torch.dtype
    ) -> PackedExperts:
        """On the meta device, for a checkpoint to be loaded into. groups: the group sizes of gate_up and down."""
        gate_up = PackedStack.empty(count, (2 * intermediate, hidden), groups[0], zeros, dtype)
        return cls(gate_up, PackedStack.empty(count, (hidden, intermediate), groups[1], zeros, dtype))

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        rows, dtype = hidden_states.shape[0], hidden_states.dtype
        capability = (9, 0)
        if hidden_states.is_cuda and not self.reference:
            require_device(hidden_states.device)
            properties = gpu_properties(hidden_states.device)
            capability = (properties.major, properties.minor)
        variant = moe_variant(hidden_states.device.type, rows, self.reference, capability)
        if variant is MoEVariant.OP and hidden_states.is_cuda and dtype != self.scales.dtype:
            variant = MoEVariant.CUDA_DEQUANTIZE  # the kernels take no other than the scales'
        if variant is MoEVariant.CUDA_DEQUANTIZE or (hidden_states.requires_grad and torch.is_grad_enabled()):
            return expert_by_expert(
                hidden_states,
                top_k_index,
                top_k_weights,
                lambda expert: self.gate_up.expanded(expert, reference=self.reference).to(dtype),
                lambda expert: self.down.expanded(expert, reference=self.reference).to(dtype),
                residual=residual,
            )
        return moe_experts(
            hidden_states,
            top_k_index,
            top_k_weights,
            self.gate_up.qweight,
            self.gate_up.scales,
            self.gate_up.zeros,
            self.down.qweight,
            self.down.scales,
            self.down.zeros,
            self.down.shape[1],
            self.gate_up.group_size,
            self.down.group_size,
            moe_experts_variant(rows, top_k_index.shape[1], self.gate_up.count, capability),
            residual,
            reference=variant is MoEVariant.REFERENCE,
        )

    def keeps_row_bits(self, rows: int) -> bool:
        """Whether up to ``rows`` rows run on the op, if they are of the scales' dtype: see
        :func:`hf_fastpath.spare_rows.keeps_row_bits`."""
        return rows <= MOE_FEW_ROWS and not self.reference

    def dequantized_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The float weights ``(E, 2 I, H)`` and ``(E, H, I)`` in the dtype of the scales."""
        if self.gate_up.qweight.is_cuda and not self.reference:
            require_device(self.gate_up.qweight.device)
        gate_up, down = (
            torch.stack([stack.expanded(expert, reference=self.reference) for expert in range(stack.count)])
            for stack in (self.gate_up, self.down)
        )
        return gate_up, down

    @property
    def scales(self) -> torch.Tensor:
        return self.gate_up.scales

    @property
    def layout(self) -> str:
        """The format in a few words, for reports."""
        sizes = sorted({self.gate_up.group_size, self.down.group_size}, reverse=True)
        groups = " and ".join(f"g{size}" for size in sizes)
        return f"int4 {groups}" + ("" if self.gate_up.zeros is None else " + zeros")

    @property
    def nbytes(self) -> int:
        """Bytes that this module holds."""
        return sum(tensor.nbytes for tensor in self.buffers())
