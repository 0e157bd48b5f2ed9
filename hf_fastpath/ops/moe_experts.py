"""A mixture of SwiGLU experts whose weights are packed int4."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from hf_fastpath import packing
from hf_fastpath.ops import _library

SCHEMA = (
    "moe_experts(Tensor x, Tensor experts, Tensor shares, Tensor gate_up_qweight, Tensor gate_up_scales, "
    "Tensor? gate_up_zeros, Tensor down_qweight, Tensor down_scales, Tensor? down_zeros, int intermediate_size, "
    "int gate_up_group_size, int down_group_size, int variant, Tensor? residual) -> Tensor"
)


@dataclasses.dataclass(frozen=True)
class ExpertsVariant:
    """One form of the CUDA kernels.

    instruction: "mma" (mma.sync, compute capability 8.0 and newer), made for a few rows: each row's bits are the same
        whatever the others are; a row alone has kernels of its own, and other bits. Or "wgmma" (9.0 only), which sorts
        the rows by expert first.
    tokens: rows of an expert that its weights meet at a time.
    """

    instruction: str
    tokens: int

    @property
    def exact_weights(self) -> bool:
        """As that of :class:`hf_fastpath.ops.w4a16_gemm.GemmVariant`."""
        return self.instruction == "mma"

    @property
    def name(self) -> str:
        """For tables: "mma_8"."""
        return f"{self.instruction}_{self.tokens}"


VARIANTS = (ExpertsVariant("mma", 8), *(ExpertsVariant("wgmma", tokens) for tokens in (32, 64, 128, 256)))

Weights = Callable[[int], torch.Tensor]  # of an expert
Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def expert_by_expert(
    x: torch.Tensor,
    experts: torch.Tensor,
    shares: torch.Tensor,
    gate_up: Weights,
    down: Weights,
    product: Product = torch.nn.functional.linear,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The mixture from float weights, each chosen expert's once, in the order of their numbers.

    Args:
        gate_up: an expert's ``(2 I, H)``; down: its ``(H, I)``, in ``x.dtype``.
        product: ``(rows, weight)`` to ``rows @ weight.T``, in which the last one may be wider than ``x.dtype``.
        residual: ``(M, H)`` to add to the sum before it is rounded, or None.
    """
    parts = x.new_zeros((*experts.shape, x.shape[1]), dtype=torch.float32)
    for expert in experts.unique().tolist():
        token, slot = (experts == expert).nonzero(as_tuple=True)
        gate, up = product(x[token], gate_up(expert)).to(x.dtype).chunk(2, dim=-1)
        inner = torch.nn.functional.silu(gate) * up
        parts[token, slot] = product(inner, down(expert)).float() * shares[token, slot, None].float()
    total = parts[:, 0]
    for slot in range(1, experts.shape[1]):
        total = total + parts[:, slot]
    return (total if residual is None else total + residual.float()).to(x.dtype)


def moe_experts_reference(
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
    residual: torch.Tensor | None,
) -> torch.Tensor:
    hidden = x.shape[1]

    def gate_up(expert: int) -> torch.Tensor:
        zeros = None if gate_up_zeros is None else gate_up_zeros[expert]
        shape = (hidden, 2 * intermediate_size, gate_up_group_size)
        return packing.dequantize(gate_up_qweight[expert], gate_up_scales[expert], zeros, *shape)

    def down(expert: int) -> torch.Tensor:
        zeros = None if down_zeros is None else down_zeros[expert]
        shape = (intermediate_size, hidden, down_group_size)
        return packing.dequantize(down_qweight[expert], down_scales[expert], zeros, *shape)

    def product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(rows.float(), weight.float())

    return expert_by_expert(x, experts, shares, gate_up, down, product, residual)


def _fake(
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
    residual: torch.Tensor | None,
) -> torch.Tensor:
    return torch.empty_like(x)


_op = _library.define(SCHEMA, moe_experts_reference, _fake)


def moe_experts(
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
    *,
    reference: bool = False,
) -> torch.Tensor:
    """``(M, H)`` in ``x.dtype``: the residual, and the sum over k of ``shares[m, k] * down(silu(gate(x)) * up(x))`` of
    expert ``experts[m, k]`` (Shazeer et al., 2017; SwiGLU: Shazeer, 2020).

    Args:
        x: ``(M, H)``, contiguous.
        experts: int64 ``(M, K)``, those of a row all different; shares: ``(M, K)`` in ``x.dtype``.
        gate_up_qweight, gate_up_scales, gate_up_zeros: the experts' packed ``(2 I, H)`` weights
            (:mod:`hf_fastpath.packing`), one after the other in a new first dimension E; rows 0..I - 1 are the gate's,
            I..2 I - 1 up's.
        down_qweight, down_scales, down_zeros: the experts' packed ``(H, I)`` weights, likewise.
        intermediate_size: I. gate_up_group_size divides H, down_group_size I.
        variant: index into :data:`VARIANTS`; every variant takes every number of rows. :mod:`hf_fastpath.heuristics`
            knows which to take. The CPU implementation has one form and ignores it.
        residual: ``(M, H)`` in ``x.dtype``, contiguous, on CUDA aligned to 16 bytes; None: none is added.
        reference: run the reference implementation, on any device.

    On CUDA x is aligned to 16 bytes, H and I are multiples of 32, and x and the scales have one dtype; an expert that
    there is not ends the kernel with an error of the device. "wgmma" variants need a workspace of 15 KB for each row
    and expert at H = 2048, I = 1792, of up to 16,384 of these at a time, and take up to 256 experts.

    Products are accumulated in float32. gate, up, silu(gate) and its product with up are each rounded to ``x.dtype``;
    the sum over k is taken in float32, in the order of k, the residual is added to it, and it is rounded once.
    """
    run = moe_experts_reference if reference else _op
    return run(
        x,
        experts,
        shares,
        gate_up_qweight,
        gate_up_scales,
        gate_up_zeros,
        down_qweight,
        down_scales,
        down_zeros,
        intermediate_size,
        gate_up_group_size,
        down_group_size,
        variant,
        residual,
    )
