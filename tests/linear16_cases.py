"""Inputs, exact results and error bounds of the products of plain 16-bit weights, as in fused_cases.py."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from fused_cases import EPS, assert_swiglu, exact_norm
from kernel_cases import ACCUMULATION, ROUNDING, SMALLEST, Target, assert_within


@dataclass(frozen=True)
class Inputs:
    """The arguments of a product."""

    target: Target
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    norm_weight: torch.Tensor | None = None
    residual: torch.Tensor | None = None

    def rows(self, rows: slice) -> Inputs:
        residual = None if self.residual is None else self.residual[rows]
        return replace(self, x=self.x[rows], residual=residual)

    def linear(self, float32_out: bool = False) -> torch.Tensor:
        ops = self.target.ops
        return ops.linear_16bit(self.x, self.weight, self.bias, self.norm_weight, EPS, self.residual, float32_out)

    def swiglu(self) -> torch.Tensor:
        return self.target.ops.linear_16bit_swiglu(self.x, self.weight, self.bias, self.norm_weight, EPS)


def make_inputs(
    target: Target,
    rng: torch.Generator,
    n: int,
    k: int,
    dtype: torch.dtype,
    *,
    norm: bool = False,
    residual: bool = False,
    bias: bool = True,
    rows: int = 16,
) -> Inputs:
    """Rows of different sizes; one is all zeros, where only eps keeps the norm finite."""

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng)

    def put(values: torch.Tensor) -> torch.Tensor:
        return values.to(dtype).to(target.device)

    x = randn(rows, k) * (torch.arange(rows) % 4 + 0.25).unsqueeze(-1)
    x[rows // 2] = 0
    return Inputs(
        target,
        put(x),
        put(randn(n, k) / k**0.5),
        put(randn(n)) if bias else None,
        put(randn(k) * 0.2 + 1) if norm else None,
        put(randn(rows, n)) if residual else None,
    )


def exact_product(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums before they are rounded to 16 bits, and their bound. A product goes through a chain's mma steps, two of
    16 columns for each of its units of 32, up to 16 chains, bias and residual."""
    rows, slack = inputs.x.double(), torch.zeros_like(inputs.x).double()
    if inputs.norm_weight is not None:
        rows, slack = exact_norm(inputs.x, inputs.norm_weight)
    w = inputs.weight.double()
    exact, magnitude = rows @ w.T, rows.abs() @ w.abs().T
    for summand in (inputs.bias, inputs.residual):
        if summand is not None:
            exact, magnitude = exact + summand.double(), magnitude + summand.double().abs()
    chains = 8 if inputs.x.shape[1] <= 4096 else 16
    steps = 2 * -(-inputs.x.shape[1] // (32 * chains)) + chains + 2
    return exact, steps * ACCUMULATION * magnitude + slack @ w.abs().T


def check_linear(inputs: Inputs, out: torch.Tensor) -> None:
    exact, bound = exact_product(inputs)
    assert_within(out, exact, bound + ROUNDING[out.dtype] * exact.abs() * 1.01 + SMALLEST)


def check_swiglu(inputs: Inputs, out: torch.Tensor) -> None:
    assert_swiglu(*exact_product(inputs), out)
