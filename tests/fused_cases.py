"""Inputs, exact results and error bounds of the int8 product and the fused int4 products, as in kernel_cases.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from kernel_cases import ACCUMULATION, ROUNDING, SMALLEST, Target, Weight, assert_within, has_own_kernel

from hf_fastpath import packing_int8

EPS = 1e-5


@dataclass(frozen=True)
class Int8Weight:
    """A packed int8 weight and what it stands for, exactly, in float64."""

    qweight: torch.Tensor
    scales: torch.Tensor
    exact: torch.Tensor
    target: Target

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self.target.ops.w8a16_linear(x, self.qweight, self.scales, bias, self.exact.shape[0])

    def dequantize(self) -> torch.Tensor:
        return self.target.ops.w8a16_dequantize(self.qweight, self.scales, self.exact.shape[0])


def make_int8_weight(target: Target, rng: torch.Generator, n: int, k: int, dtype: torch.dtype) -> Int8Weight:
    """Every byte occurs, -128 too."""
    q = torch.randint(-128, 128, (n, k), generator=rng, dtype=torch.int8)
    q[0, :2] = torch.tensor([-128, 127])
    scales = ((torch.rand(n, generator=rng) + 0.5) / 500).to(dtype)
    exact = q.double() * scales.double().unsqueeze(-1)
    packed = packing_int8.pack_int8(q).to(target.device)
    return Int8Weight(packed, scales.to(target.device), exact.to(target.device), target)


def check_int8_linear(x: torch.Tensor, weight: Int8Weight, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """Against float64. A product goes through a warp's mma steps, the warps, the scale and the bias."""
    exact, magnitude = x.double() @ weight.exact.T, x.double().abs() @ weight.exact.abs().T
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    steps = 4 * -(-x.shape[1] // 512) + 8 + 2
    bound = steps * ACCUMULATION * magnitude + ROUNDING[out.dtype] * exact.abs() * 1.01 + SMALLEST
    assert_within(out, exact, bound)


@dataclass(frozen=True)
class FusedInputs:
    """What a fused product takes beside its weight."""

    x: torch.Tensor
    bias: torch.Tensor | None = None
    norm_weight: torch.Tensor | None = None
    residual: torch.Tensor | None = None

    def rows(self, rows: slice) -> FusedInputs:
        residual = None if self.residual is None else self.residual[rows]
        return FusedInputs(self.x[rows], self.bias, self.norm_weight, residual)

    def linear(self, w: Weight) -> torch.Tensor:
        packed = (self.x, w.qweight, w.scales, w.zeros, self.bias)
        n = w.exact.shape[0]
        return w.target.ops.w4a16_linear_fused(*packed, self.norm_weight, EPS, self.residual, n, w.group)

    def swiglu(self, w: Weight) -> torch.Tensor:
        packed = (self.x, w.qweight, w.scales, w.zeros, self.bias)
        return w.target.ops.w4a16_swiglu(*packed, self.norm_weight, EPS, w.exact.shape[0] // 2, w.group)


def make_fused_inputs(
    target: Target, rng: torch.Generator, rows: int, w: Weight, dtype: torch.dtype, *, norm: bool, residual: bool
) -> FusedInputs:
    """Rows of different sizes; one is all zeros, where only eps keeps the norm finite."""
    n, k = w.exact.shape

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng)

    x = randn(rows, k) * (torch.arange(rows) % 4 + 0.25).unsqueeze(-1)
    x[rows // 2] = 0
    norm_weight = (randn(k) * 0.2 + 1).to(dtype).to(target.device) if norm else None
    return FusedInputs(
        x.to(dtype).to(target.device),
        randn(n).to(dtype).to(target.device),
        norm_weight,
        randn(rows, n).to(dtype).to(target.device) if residual else None,
    )


def exact_norm(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """LlamaRMSNorm of x as float64 of its 16-bit values, and how far the kernel's may be off.

    Its 1 / rms is off by the sum over K / 256 squares a thread, 16 steps over lanes and warps (each 2^-24, halved by
    the root), rsqrtf (two units: 2^-22) and one product. That matters only where it carries a rounding over a tie.
    """
    delta = (x.shape[1] / 256 + 16) * 2.0**-25 + 2.0**-22 + 2.0**-24
    normalized = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + EPS)
    low, middle, high = (weight * (normalized * (1 + d)).to(x.dtype) for d in (-delta, 0.0, delta))
    return middle.double(), torch.maximum((low - middle).double().abs(), (high - middle).double().abs())


def exact_product(inputs: FusedInputs, w: Weight) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums before they are rounded to 16 bits, and their bound: steps as in kernel_cases.check_linear."""
    rows, slack = inputs.x.double(), torch.zeros_like(inputs.x).double()
    if inputs.norm_weight is not None:
        rows, slack = exact_norm(inputs.x, inputs.norm_weight)
    exact, magnitude = rows @ w.exact.T, rows.abs() @ w.exact.abs().T
    for summand in (inputs.bias, inputs.residual):
        if summand is not None:
            exact, magnitude = exact + summand.double(), magnitude + summand.double().abs()
    steps = w.group // 16 + -(-inputs.x.shape[1] // (8 * w.group)) + 8 + 2
    return exact, steps * ACCUMULATION * magnitude + slack @ w.exact.abs().T


def check_fused_linear(inputs: FusedInputs, w: Weight, out: torch.Tensor) -> None:
    exact, bound = exact_product(inputs, w)
    assert_within(out, exact, bound + ROUNDING[out.dtype] * exact.abs() * 1.01 + SMALLEST)


def check_swiglu(inputs: FusedInputs, w: Weight, out: torch.Tensor) -> None:
    assert_swiglu(*exact_product(inputs, w), out)


def check_fused_rows(inputs: FusedInputs, w: Weight, rows: slice, full: torch.Tensor, *, gated: bool = False) -> None:
    """Some rows have the bits that they have among more, ``full``, where one kernel does both."""
    part = inputs.rows(rows)
    out = part.swiglu(w) if gated else part.linear(w)
    if has_own_kernel(*part.x.shape):
        (check_swiglu if gated else check_fused_linear)(part, w, out)
    else:
        assert torch.equal(out, full[rows])


def assert_swiglu(exact: torch.Tensor, bound: torch.Tensor, out: torch.Tensor) -> None:
    """``exact``: gate and up side by side, before any rounding. The very bits where no rounding hangs on the order of a
    sum; elsewhere a bound that follows each rounding."""
    dtype, rounding = out.dtype, ROUNDING[out.dtype]
    (gate, up), (gate_bound, up_bound) = exact.chunk(2, dim=-1), bound.chunk(2, dim=-1)

    def certain(value: torch.Tensor, error: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """value rounded to 16 bits, and where that does not depend on its error."""
        return value.to(dtype).double(), (value - error).to(dtype) == (value + error).to(dtype)

    g, g_certain = certain(gate, gate_bound)
    u, u_certain = certain(up, up_bound)
    silu = g / (1 + torch.exp(-g).float().double())  # infinite below -88.7, as in float32
    s, s_certain = certain(silu, silu.abs() * 2.0**-20)  # expf and the division: a few units of 2^-23
    known = g_certain & u_certain & s_certain
    # In fp16 the worst case of a long sum's error is as large as a rounding step, so that little is certain.
    assert known.double().mean() > (0.3 if dtype is torch.bfloat16 else 0)
    assert torch.equal(out[known], (s * u).to(dtype)[known])
    # |silu'| < 1.1
    gate_error = gate_bound + rounding * (gate.abs() + gate_bound) + SMALLEST
    silu_exact = gate / (1 + torch.exp(-gate))
    silu_error = (1.1 * gate_error + SMALLEST) * (1 + rounding) + (rounding + 2.0**-20) * silu_exact.abs()
    up_error = up_bound + rounding * (up.abs() + up_bound) + SMALLEST
    error = silu_error * up.abs() + silu_exact.abs() * up_error + silu_error * up_error
    product = silu_exact * up
    assert_within(out, product, error + 1.01 * rounding * (product.abs() + error) + SMALLEST)
