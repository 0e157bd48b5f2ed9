"""Inputs and exact results of what is between a layer's products, on a GPU (tests/gpu) and in the emulator alike."""

from __future__ import annotations

import torch
from fused_cases import EPS, exact_norm
from kernel_cases import ROUNDING, SMALLEST, Target, assert_within, shifted

# Rows and columns: one piece of a row's warps and less, several, more than a thread holds.
NORM_SHAPES = [(1, 8), (3, 96), (17, 576), (5, 2048), (4, 4104), (2, 8192), (3, 8208)]
SWIGLU_SHAPES = [(1, 8), (3, 48), (17, 96), (33, 344), (2, 2048), (3, 2056)]  # rows and ups


def norm_inputs(
    target: Target, rng: torch.Generator, rows: int, columns: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x with gaps between its rows, a residual and a weight; rows differ in size, one sum is zero."""
    x = torch.randn(rows, columns, generator=rng) * (torch.arange(rows) % 4 + 0.25).unsqueeze(-1)
    residual = torch.randn(rows, columns, generator=rng)
    x[rows // 2] = -residual[rows // 2]
    weight = torch.randn(columns, generator=rng) * 0.2 + 1
    x, residual, weight = (tensor.to(dtype).to(target.device) for tensor in (x, residual, weight))
    return shifted(x, offset=8, extra=8), residual, weight


def check_norm(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """Against float64, see :func:`fused_cases.exact_norm`; the last product is rounded within what it says."""
    exact, slack = exact_norm(x, weight)
    assert_within(out, exact, slack)


def check_norms(target: Target, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> None:
    """Both ops: the sum has the very bits of torch's, and a row's norm those that it has alone."""
    alone = target.ops.rms_norm(x, weight, EPS)
    check_norm(x, weight, alone)
    total, normalized = target.ops.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, x + residual)
    assert torch.equal(normalized, target.ops.rms_norm(total, weight, EPS))
    row = x.shape[0] // 2
    assert torch.equal(target.ops.rms_norm(x[row : row + 1], weight, EPS), alone[row : row + 1])
    if x.stride(1) == 1 and x.shape[0] > 1:
        assert torch.equal(target.ops.add_rms_norm(x[1:], residual[1:], weight, EPS)[1], normalized[1:])


def check_swiglu_op(x: torch.Tensor, out: torch.Tensor) -> None:
    """silu's expf and division are off by a few units of 2^-23 before they are rounded; then one product is."""
    gate, up = x.double().chunk(2, dim=-1)
    silu = gate / (1 + torch.exp(-gate).float().double())  # infinite below -88.7, as in float32
    error = silu.abs() * (ROUNDING[x.dtype] * 1.01 + 2.0**-20) + SMALLEST
    exact = silu * up
    assert_within(out, exact, error * up.abs() * 1.01 + ROUNDING[x.dtype] * 1.01 * exact.abs() + SMALLEST)
