"""Inputs, exact results and error bounds of a mixture of 16-bit experts, as in kernel_cases.py."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from kernel_cases import ACCUMULATION, ROUNDING, SMALLEST, Target, assert_within
from moe_cases import _rounded


@dataclass(frozen=True)
class Mixture:
    """Experts, and rows that were sent to some of them."""

    target: Target
    x: torch.Tensor
    experts: torch.Tensor
    shares: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    residual: torch.Tensor | None

    def rows(self, rows: slice | list[int]) -> Mixture:
        residual = None if self.residual is None else self.residual[rows]
        return replace(self, x=self.x[rows], experts=self.experts[rows], shares=self.shares[rows], residual=residual)

    def arguments(self) -> tuple[torch.Tensor | None, ...]:
        return self.x, self.experts, self.shares, self.gate_up, self.down, self.residual

    def run(self) -> torch.Tensor:
        return self.target.ops.moe_experts_16bit(*self.arguments())


def make_mixture(
    target: Target,
    rng: torch.Generator,
    rows: int,
    top_k: int,
    count: int,
    sizes: tuple[int, int],
    dtype: torch.dtype,
    *,
    used: int | None = None,
    residual: bool = False,
) -> Mixture:
    """sizes: hidden and intermediate. used: only the first so many experts are chosen."""
    hidden, inner = sizes

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=rng) * scale).to(dtype).to(target.device)

    experts = torch.rand(rows, used or count, generator=rng).topk(top_k).indices.to(target.device)
    return Mixture(
        target,
        random(rows, hidden),
        experts,
        torch.rand(rows, top_k, generator=rng).to(dtype).to(target.device),
        random(count, 2 * inner, hidden, scale=hidden**-0.5),
        random(count, hidden, inner, scale=inner**-0.5),
        random(rows, hidden) if residual else None,
    )


def _product(rows: torch.Tensor, error: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``rows @ weight.T`` and its bound: a sum goes through a warp's mma steps, those of every eighth unit of 64
    columns, and then the warps."""
    steps = 4 * -(-weight.shape[1] // (8 * 64)) + 8
    return rows @ weight.T, steps * ACCUMULATION * (rows.abs() @ weight.abs().T) + error @ weight.abs().T


def check_experts(mixture: Mixture, out: torch.Tensor) -> None:
    """Against float64, with a bound that follows each rounding."""
    dtype, x = mixture.x.dtype, mixture.x.double()
    exact, bound = torch.zeros_like(x), torch.zeros_like(x)
    pairs = [(expert, *(mixture.experts == expert).nonzero(as_tuple=True)) for expert in mixture.experts.unique()]
    for expert, row, slot in pairs:
        both, error = _product(x[row], torch.zeros_like(x[row]), mixture.gate_up[expert].double())
        (gate, up), (gate_error, up_error) = both.chunk(2, -1), error.chunk(2, -1)
        gate, gate_error = _rounded(gate, gate_error, dtype)
        up, up_error = _rounded(up, up_error, dtype)
        silu = gate / (1 + torch.exp(-gate))
        # |silu'| < 1.1; expf and the division are off by a few units of 2^-23.
        silu, silu_error = _rounded(silu, 1.1 * gate_error + 2.0**-20 * silu.abs(), dtype)
        error = silu_error * up.abs() + silu.abs() * up_error + silu_error * up_error
        inner, error = _rounded(silu * up, error, dtype)
        product, error = _product(inner, error, mixture.down[expert].double())
        share = mixture.shares[row, slot, None].double()
        exact.index_add_(0, row, share * product)
        # Its product with the share, and one addition for each other expert and the residual, of float32.
        bound.index_add_(0, row, share * (error + (mixture.experts.shape[1] + 2) * 2.0**-23 * product.abs()))
    if mixture.residual is not None:
        exact += mixture.residual.double()
        bound += 2.0**-23 * mixture.residual.double().abs()
    assert_within(out, exact, bound + ROUNDING[dtype] * (exact.abs() + bound) * 1.01 + SMALLEST)
