"""A mixture of SwiGLU experts whose weights are in 16 bits, as transformers has them."""

from __future__ import annotations

import torch

from hf_fastpath.ops import _library
from hf_fastpath.ops.moe_experts import expert_by_expert

SCHEMA = (
    "moe_experts_16bit(Tensor x, Tensor experts, Tensor shares, Tensor gate_up, Tensor down, Tensor? residual) "
    "-> Tensor"
)


def moe_experts_16bit_reference(
    x: torch.Tensor,
    experts: torch.Tensor,
    shares: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    def product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(rows.float(), weight.float())

    weights = (gate_up.__getitem__, down.__getitem__)
    return expert_by_expert(x, experts, shares, *weights, product=product, residual=residual)


def _fake(
    x: torch.Tensor,
    experts: torch.Tensor,
    shares: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    return torch.empty_like(x)


_op = _library.define(SCHEMA, moe_experts_16bit_reference, _fake)


def moe_experts_16bit(
    x: torch.Tensor,
    experts: torch.Tensor,
    shares: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    residual: torch.Tensor | None = None,
    *,
    reference: bool = False,
) -> torch.Tensor:
    """``(M, H)`` in ``x.dtype``: ``residual`` and the sum over k of ``shares[m, k] * down(silu(gate(x)) * up(x))`` of
    expert ``experts[m, k]`` (Shazeer et al., 2017; SwiGLU: Shazeer, 2020).

    Args:
        x: ``(M, H)``, contiguous.
        experts: int64 ``(M, K)``, those of a row all different; shares: ``(M, K)`` in ``x.dtype``.
        gate_up: ``(E, 2 I, H)``, contiguous; rows 0..I - 1 of an expert are the gate's, I..2 I - 1 up's.
        down: ``(E, H, I)``, contiguous.
        residual: ``(M, H)``, contiguous, or None.
        reference: run the reference implementation, on any device.

    On CUDA all floats are of one dtype, float16 or bfloat16; H and I are multiples of 32; x, gate_up and down are
    aligned to 16 bytes. An expert that there is not ends the kernel with an error of the device. The kernel is made for
    a few rows: it takes 256 pairs of a row and an expert at a time, and of these reads a chosen expert's weights once
    for each 16 (of up to 8 rows: 8). A row's bits are the same whatever the others are.

    Products are accumulated in float32. gate, up, silu(gate) and its product with up are each rounded to ``x.dtype``;
    the sum over k is taken in float32, in the order of k, the residual is added last, and the result rounded once.
    """
    run = moe_experts_16bit_reference if reference else _op
    return run(x, experts, shares, gate_up, down, residual)
