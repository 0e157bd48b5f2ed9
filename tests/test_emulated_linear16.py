"""The products of plain 16-bit weights: the CUDA kernels in the emulator, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from emulated import EmulatedOps
from emulator import KernelFault, needs_emulator
from fused_cases import EPS, exact_norm
from kernel_cases import DTYPES, SMALLEST, Target, assert_within, generator, shifted
from linear16_cases import Inputs, check_linear, check_swiglu, make_inputs

pytestmark = needs_emulator

ROWS = (1, 2, 3, 4, 5, 8, 9, 15)


def make(n: int, k: int, dtype: torch.dtype, *, norm: bool = False, residual: bool = False, rows: int = 16) -> Inputs:
    rng = generator(n, k, norm, residual, DTYPES.index(dtype))
    return make_inputs(Target("cpu", EmulatedOps()), rng, n, k, dtype, norm=norm, residual=residual, rows=rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("norm", "residual"), [(True, False), (False, True), (True, True), (False, False)])
@pytest.mark.parametrize(("n", "k"), [(1, 32), (17, 96), (40, 576), (129, 288)])
def test_linear(n: int, k: int, norm: bool, residual: bool, dtype: torch.dtype) -> None:
    """Tails of N, fewer units of K than warps and more, CTAs with several blocks."""
    inputs = make(n, k, dtype, norm=norm, residual=residual)
    full = inputs.linear()
    check_linear(inputs, full)
    for m in ROWS:
        assert torch.equal(inputs.rows(slice(0, m)).linear(), full[:m])
    assert torch.equal(inputs.rows(slice(11, 12)).linear(), full[11:12])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize(("n", "k"), [(32, 96), (96, 576), (160, 256)])
def test_swiglu(n: int, k: int, norm: bool, dtype: torch.dtype) -> None:
    inputs = make(n, k, dtype, norm=norm)
    full = inputs.swiglu()
    assert full.shape == (16, n // 2)
    check_swiglu(inputs, full)
    for m in ROWS:
        assert torch.equal(inputs.rows(slice(0, m)).swiglu(), full[:m])
    assert torch.equal(inputs.rows(slice(11, 12)).swiglu(), full[11:12])


@pytest.mark.parametrize("k", [2080, 4128], ids=["half of the longest held K", "sixteen chains"])
def test_a_long_row(k: int) -> None:
    inputs = make(33, k, torch.bfloat16, norm=True, residual=True)
    full = inputs.linear()
    check_linear(inputs, full)
    assert torch.equal(inputs.rows(slice(2, 3)).linear(), full[2:3])
    assert torch.equal(inputs.rows(slice(3, 11)).linear(), full[3:11])


@pytest.mark.parametrize("k", [64, 320])
def test_many_blocks(k: int) -> None:
    """So many that a CTA keeps x of five rows and more in registers."""
    inputs = make(420, k, torch.bfloat16, residual=True)
    full = inputs.linear()
    check_linear(inputs, full)
    for m in (4, 5, 8):
        assert torch.equal(inputs.rows(slice(0, m)).linear(), full[:m])


def test_float32_of_rounded_values() -> None:
    inputs = make(50, 160, torch.bfloat16)
    for m in (1, 8, 13):
        few = inputs.rows(slice(0, m))
        wide = few.linear(float32_out=True)
        assert wide.dtype is torch.float32
        assert torch.equal(wide, few.linear().float())


def test_what_is_not_finite_stays_in_its_row() -> None:
    """Also where K has fewer units than there are warps, some of which then have none."""
    inputs = make(20, 96, torch.float16)
    expected = inputs.linear()
    inputs.x[3, 5], inputs.x[9, 90] = float("nan"), float("inf")
    out = inputs.linear()
    others = [row for row in range(16) if row not in (3, 9)]
    assert torch.equal(out[others], expected[others])
    assert out[3].isnan().all()
    assert torch.equal(out[9], inputs.weight[:, 90] * float("inf"))


def test_rows_with_gaps_between_them() -> None:
    inputs = make(20, 128, torch.bfloat16, norm=True, residual=True)
    expected = inputs.linear()
    assert torch.equal(replace(inputs, x=shifted(inputs.x, offset=8, extra=8)).linear(), expected)
    for offset, extra in ((1, 8), (8, 4)):
        with pytest.raises(KernelFault, match="CUDA error 716"):  # cudaErrorMisalignedAddress, by the launcher
            replace(inputs, x=shifted(inputs.x, offset=offset, extra=extra)).linear()


def test_rows_of_a_weight_are_a_weight() -> None:
    inputs = make(80, 96, torch.bfloat16)
    assert inputs.bias is not None
    part = replace(inputs, weight=inputs.weight[13:46], bias=inputs.bias[13:46])
    assert torch.equal(part.linear(), inputs.linear()[:, 13:46])


def test_what_the_kernels_do_not_take_is_refused() -> None:
    inputs = make(20, 128, torch.float16)
    with pytest.raises(KernelFault, match="CUDA error 1"):
        replace(inputs, x=inputs.x[:, :104].contiguous(), weight=inputs.weight[:, :104].contiguous()).linear()
    with pytest.raises(KernelFault, match="CUDA error 1"):
        inputs.swiglu()  # ten rows of each
    with pytest.raises(KernelFault, match="CUDA error 1"):
        replace(inputs, x=inputs.x.repeat(2, 1)).linear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [8, 2056, 8320])
def test_rms_norm(k: int, dtype: torch.dtype) -> None:
    inputs = make(1, k, dtype, norm=True, rows=5)
    assert inputs.norm_weight is not None
    exact, slack = exact_norm(inputs.x, inputs.norm_weight)
    out = inputs.target.ops.rms_norm(inputs.x, inputs.norm_weight, EPS)
    assert_within(out, exact, slack + SMALLEST)
    spaced = shifted(inputs.x, offset=8, extra=8)
    assert torch.equal(inputs.target.ops.rms_norm(spaced, inputs.norm_weight, EPS), out)
