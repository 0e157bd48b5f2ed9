"""Inputs, exact results and error bounds of kernel tests, on a GPU (tests/gpu) and in the emulator alike."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from hf_fastpath import packing
from hf_fastpath.ops.w4a16_gemm import GemmVariant

DTYPES = (torch.float16, torch.bfloat16)
# Largest relative error of one rounding (half a unit in the last place: 11 and 8 significant bits).
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST = 2.0**-25  # half of fp16's smallest subnormal
# Tensor cores truncate where they add: one bit more than fp32's 2^-24, and one for the alignment of the products.
ACCUMULATION = 2.0**-22


@dataclass(frozen=True)
class Target:
    """Where kernels run: the device of their tensors, and what has the ops of hf_fastpath.ops under their names."""

    device: str
    ops: Any


def generator(*seed: int) -> torch.Generator:
    """A generator of its own for every case, on the CPU so that inputs are the same on every machine."""
    value = 17
    for part in seed:
        value = value * 1_000_003 + part
    return torch.Generator().manual_seed(value % 2**63)


def poison(*shape: int, dtype: torch.dtype, device: str) -> None:
    """Leaves NaN in the memory that torch will most likely hand out next for this shape: unwritten elements show."""
    del_me = torch.full(shape, float("nan"), dtype=dtype, device=device)
    del del_me


@dataclass(frozen=True)
class Weight:
    """A packed weight and what it stands for, exactly, in float64."""

    qweight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    exact: torch.Tensor
    group: int
    target: Target

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self.target.ops.w4a16_linear(
            x, self.qweight, self.scales, self.zeros, bias, self.exact.shape[0], self.group
        )

    def gemm(
        self,
        x: torch.Tensor,
        variant: int,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.target.ops.w4a16_gemm(
            x, self.qweight, self.scales, self.zeros, bias, self.exact.shape[0], self.group, variant, residual
        )

    def gemm_swiglu(self, x: torch.Tensor, variant: int, bias: torch.Tensor | None = None) -> torch.Tensor:
        packed, half = (self.qweight, self.scales, self.zeros, bias), self.exact.shape[0] // 2
        return self.target.ops.w4a16_gemm_swiglu(x, *packed, half, self.group, variant)

    def dequantize(self) -> torch.Tensor:
        n, k = self.exact.shape
        return self.target.ops.w4a16_dequantize(self.qweight, self.scales, self.zeros, k, n, self.group)

    def dequantize_on_cpu(self) -> torch.Tensor:
        n, k = self.exact.shape
        zeros = None if self.zeros is None else self.zeros.cpu()
        return packing.dequantize(self.qweight.cpu(), self.scales.cpu(), zeros, k, n, self.group)

    def row_tiles(self, start: int, stop: int, rows: int) -> Weight:
        """The view of some 16-row tiles, of which ``rows`` rows count."""
        zeros = None if self.zeros is None else self.zeros[start:stop]
        exact = self.exact[16 * start : 16 * start + rows]
        return Weight(self.qweight[start:stop], self.scales[start:stop], zeros, exact, self.group, self.target)


def make_weight(
    target: Target, rng: torch.Generator, n: int, k: int, group: int, dtype: torch.dtype, *, with_zeros: bool = False
) -> Weight:
    q = torch.randint(0, 16, (n, k), generator=rng)
    scales = ((torch.rand(n, k // group, generator=rng) + 0.5) / 50).to(dtype)
    zeros = torch.randint(0, 16, (n, k // group), generator=rng, dtype=torch.uint8) if with_zeros else None
    shift = zeros.double() if zeros is not None else torch.full((n, k // group), 8.0, dtype=torch.float64)
    exact = (q.double().view(n, -1, group) - shift.unsqueeze(-1)) * scales.double().unsqueeze(-1)
    return Weight(
        packing.pack_int4(q).to(target.device),
        packing.pack_per_group(scales, 0.0).to(target.device),
        None if zeros is None else packing.pack_per_group(zeros, packing.SYMMETRIC_ZERO).to(target.device),
        exact.view(n, k).to(target.device),
        group,
        target,
    )


def with_far_scales(weight: Weight, rng: torch.Generator) -> Weight:
    """The same weight with scales that differ by powers of two, as far as no weight is subnormal or infinite."""
    low, high = (-8, 6) if weight.scales.dtype is torch.float16 else (-60, 20)
    powers = torch.randint(low, high, weight.scales.shape, generator=rng).to(weight.scales.device)
    return dataclasses.replace(weight, scales=torch.ldexp(weight.scales, powers).to(weight.scales.dtype))


def shifted(x: torch.Tensor, *, offset: int = 1, extra: int = 3) -> torch.Tensor:
    """The same matrix at an odd element offset with a larger row stride, NaN around it."""
    rows, cols = x.shape
    buffer = torch.full((rows * (cols + extra) + offset + extra,), float("nan"), dtype=x.dtype, device=x.device)
    view = buffer.as_strided((rows, cols), (cols + extra, 1), offset)
    view.copy_(x)
    return view


def assert_within(out: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor) -> None:
    """Every element of out within its bound of the exact value; a NaN never is."""
    error = (out.double() - exact).abs()
    bad = ~(error <= bound)
    if bad.any():
        worst = int(torch.where(error.isnan(), torch.inf, error - bound).argmax())
        raise AssertionError(
            f"{int(bad.sum())} of {out.numel()} elements beyond their bound; worst at flat index {worst}: "
            f"{float(out.flatten()[worst])} instead of {float(exact.flatten()[worst])}, "
            f"bound {float(bound.flatten()[worst])}"
        )


def check_linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """Against float64. A product goes through at most: a group's mma steps, a warp's groups, the warps, the bias."""
    exact = x.double() @ weight.exact.T
    magnitude = x.double().abs() @ weight.exact.abs().T
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    k = x.shape[1]
    steps = weight.group // 16 + -(-k // (8 * weight.group)) + 8 + 1
    bound = steps * ACCUMULATION * magnitude + ROUNDING[out.dtype] * exact.abs() * 1.01 + SMALLEST
    assert_within(out, exact, bound)


def has_own_kernel(rows: int, k: int) -> bool:
    """Whether int4 products of so many rows are those of csrc/common/one_row.cuh, which adds in another order."""
    return rows == 1 and k % 128 == 0


def check_rows(
    x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, out: torch.Tensor, of_many: torch.Tensor
) -> None:
    """Some rows of a product have the bits of a product of more rows, ``of_many``, where one kernel does both."""
    if has_own_kernel(*x.shape):
        check_linear(x, weight, bias, out)
    else:
        assert torch.equal(out, of_many)


def check_gemm(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    variant: GemmVariant,
    residual: torch.Tensor | None = None,
) -> None:
    """Against float64. A product goes through at most: a group's mma steps, all groups, all CTAs' parts, the bias, the
    residual."""
    exact = x.double() @ weight.exact.T
    magnitude = x.double().abs() @ weight.exact.abs().T
    for summand in (bias, residual):
        if summand is not None:
            exact, magnitude = exact + summand.double(), magnitude + summand.double().abs()
    k = x.shape[1]
    steps = weight.group // 16 + k // weight.group + -(-k // 128) + 2
    relative = steps * ACCUMULATION + (0.0 if variant.exact_weights else ROUNDING[out.dtype])
    bound = relative * magnitude + ROUNDING[out.dtype] * exact.abs() * 1.01 + SMALLEST
    assert_within(out, exact, bound)


def masks(rng: torch.Generator, batch: int, length: int) -> torch.Tensor:
    """Row 0 sees all, row 1 is left-padded, row 2 has holes, row 3 sees nothing, row 4 only its last token."""
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[1, : length - max(1, length // 3)] = False
    mask[2] = torch.rand(length, generator=rng) < 0.5
    mask[2, -1] = True
    mask[3] = False
    mask[4, :-1] = False
    return mask
