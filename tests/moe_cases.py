"""Inputs, exact results and error bounds of a mixture's router and experts, as in kernel_cases.py."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from kernel_cases import ACCUMULATION, ROUNDING, SMALLEST, Target, assert_within, make_weight

from hf_fastpath.ops.moe_experts import ExpertsVariant


@dataclass(frozen=True)
class Stack:
    """E packed weights of one shape, and what they stand for in float64, ``(E, N, K)``."""

    qweight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    exact: torch.Tensor
    group: int


def make_stack(
    target: Target, rng: torch.Generator, count: int, n: int, k: int, group: int, dtype: torch.dtype, *, zeros: bool
) -> Stack:
    weights = [make_weight(target, rng, n, k, group, dtype, with_zeros=zeros) for _ in range(count)]
    return Stack(
        torch.stack([each.qweight for each in weights]),
        torch.stack([each.scales for each in weights]),
        torch.stack([each.zeros for each in weights if each.zeros is not None]) if zeros else None,
        torch.stack([each.exact for each in weights]),
        group,
    )


@dataclass(frozen=True)
class Mixture:
    """Experts, and rows that were sent to some of them."""

    target: Target
    x: torch.Tensor
    experts: torch.Tensor
    shares: torch.Tensor
    gate_up: Stack
    down: Stack
    residual: torch.Tensor | None = None

    def rows(self, rows: slice | list[int]) -> Mixture:
        residual = None if self.residual is None else self.residual[rows].clone()  # aligned, unlike the view
        return replace(self, x=self.x[rows], experts=self.experts[rows], shares=self.shares[rows], residual=residual)

    @property
    def has_own_kernels(self) -> bool:
        """Whether it runs on csrc/moe/one_row.cuh, which adds in another order than the kernels for more rows."""
        sizes = self.x.shape[1], self.down.exact.shape[2]
        return len(self.x) == 1 and self.experts.shape[1] <= 16 and all(size % 128 == 0 for size in sizes)

    def run(self, variant: int = 0) -> torch.Tensor:
        up, down = self.gate_up, self.down
        return self.target.ops.moe_experts(
            *(self.x, self.experts, self.shares, up.qweight, up.scales, up.zeros),
            *(down.qweight, down.scales, down.zeros, down.exact.shape[2], up.group, down.group, variant),
            self.residual,
        )


def make_mixture(
    target: Target,
    rng: torch.Generator,
    rows: int,
    top_k: int,
    count: int,
    sizes: tuple[int, int],
    groups: tuple[int, int],
    dtype: torch.dtype,
    *,
    zeros: bool = True,
    used: int | None = None,
    residual: bool = False,
) -> Mixture:
    """sizes: hidden and intermediate. used: only the first so many experts are chosen."""
    hidden, inner = sizes
    scores = torch.rand(rows, used or count, generator=rng)
    return Mixture(
        target,
        torch.randn(rows, hidden, generator=rng).to(dtype).to(target.device),
        scores.topk(top_k).indices.to(target.device),
        torch.rand(rows, top_k, generator=rng).to(dtype).to(target.device),
        make_stack(target, rng, count, 2 * inner, hidden, groups[0], dtype, zeros=zeros),
        make_stack(target, rng, count, hidden, inner, groups[1], dtype, zeros=zeros),
        torch.randn(rows, hidden, generator=rng).to(dtype).to(target.device) if residual else None,
    )


def _rounded(value: torch.Tensor, error: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A value rounded to 16 bits, and how far that of a value within `error` can be from it: no more than the rounded
    ends of its interval are, and nothing where no rounding hangs on the error."""
    middle, low, high = (each.to(dtype).double() for each in (value, value - error, value + error))
    return middle, torch.maximum(middle - low, high - middle)


def _product(rows: torch.Tensor, error: torch.Tensor, weight: torch.Tensor, group: int, variant: ExpertsVariant,
             dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """``rows @ weight.T`` and its bound, as kernel_cases.check_linear counts the steps of a sum."""
    steps = group // 16 + weight.shape[1] // group + 8 + 2
    relative = steps * ACCUMULATION + (0.0 if variant.exact_weights else ROUNDING[dtype])
    return rows @ weight.T, relative * (rows.abs() @ weight.abs().T) + error @ weight.abs().T


def check_rows(part: Mixture, out: torch.Tensor, of_many: torch.Tensor, variant: ExpertsVariant) -> None:
    """Rows alone have the bits that they have among more, where the same kernels run."""
    if part.has_own_kernels:
        check_experts(part, out, variant)
    else:
        assert torch.equal(out, of_many)


def check_experts(mixture: Mixture, out: torch.Tensor, variant: ExpertsVariant) -> None:
    """Against float64, with a bound that follows each rounding."""
    dtype, x = mixture.x.dtype, mixture.x.double()
    exact, bound = torch.zeros_like(x), torch.zeros_like(x)
    for row in range(len(x)):
        for expert, share in zip(mixture.experts[row].tolist(), mixture.shares[row].double(), strict=True):
            up_weight, down_weight = mixture.gate_up.exact[expert], mixture.down.exact[expert]
            one = x[row : row + 1]
            both = _product(one, torch.zeros_like(one), up_weight, mixture.gate_up.group, variant, dtype)
            (gate, up), (gate_error, up_error) = both[0].chunk(2, -1), both[1].chunk(2, -1)
            gate, gate_error = _rounded(gate, gate_error, dtype)
            up, up_error = _rounded(up, up_error, dtype)
            silu = gate / (1 + torch.exp(-gate))
            # |silu'| < 1.1; expf and the division are off by a few units of 2^-23.
            silu, silu_error = _rounded(silu, 1.1 * gate_error + 2.0**-20 * silu.abs(), dtype)
            error = silu_error * up.abs() + silu.abs() * up_error + silu_error * up_error
            inner, error = _rounded(silu * up, error, dtype)
            product, error = _product(inner, error, down_weight, mixture.down.group, variant, dtype)
            exact[row] += share * product[0]
            bound[row] += share * (error[0] + 2.0**-22 * product[0].abs())
    if mixture.residual is not None:
        exact, bound = exact + mixture.residual.double(), bound + 2.0**-23 * (exact.abs() + mixture.residual.abs())
    assert_within(out, exact, bound + ROUNDING[dtype] * (exact.abs() + bound) * 1.01 + SMALLEST)


def check_router(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    top_k: int,
    normalize: bool,
    scaling: float,
    got: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Logits against float64; what follows from them, bit for bit but for a unit in the last place of a sigmoid."""
    logits, shares, experts = got
    dtype, unit = x.dtype, 2 * ROUNDING[x.dtype]
    exact, magnitude = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    bound = (x.shape[1] // 16 + 72) * ACCUMULATION * magnitude
    assert_within(logits, exact, bound + ROUNDING[dtype] * exact.abs() * 1.01 + SMALLEST)
    scores = logits.double().sigmoid()
    ranked = scores if bias is None else scores + bias.double()
    place = ranked.sort(dim=-1, descending=True, stable=True).values[:, top_k - 1 : top_k]
    slack = unit * scores + 1e-6
    for row in range(len(x)):
        chosen = experts[row].tolist()
        assert len(set(chosen)) == top_k
        values = ranked[row, chosen]
        assert bool((values >= place[row] - slack[row, chosen]).all())
        assert bool((values[:-1] >= values[1:] - slack[row, chosen[1:]]).all())  # by falling score
    expected = scores.gather(1, experts)
    if normalize:
        expected = expected / (expected.sum(-1, keepdim=True) + 1e-6)
    # Score, sum, sum and epsilon, quotient, product with `scaling`: five roundings.
    assert_within(shares, expected * scaling, (5.1 * ROUNDING[dtype] * expected * scaling).abs() + SMALLEST)


def check_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, normalized: torch.Tensor) -> None:
    """Against float64, with the two roundings of LlamaRMSNorm; float32's errors are far below them."""
    wide = x.double()
    exact = weight.double() * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    assert_within(normalized, exact, 2.05 * ROUNDING[x.dtype] * exact.abs() + SMALLEST * (1 + weight.double().abs()))
