"""The fused int4 products: the CUDA kernels in the emulator, against float64."""

from __future__ import annotations

import kernel_cases
import pytest
import torch
from emulated import EmulatedOps
from emulator import KernelFault, needs_emulator
from fused_cases import FusedInputs, check_fused_linear, check_fused_rows, check_swiglu, make_fused_inputs
from kernel_cases import DTYPES, Target, Weight, generator, shifted

pytestmark = needs_emulator

ROWS = (1, 2, 4, 5, 8, 9, 15)


def make(
    n: int, k: int, group: int, dtype: torch.dtype, *, norm: bool, residual: bool, zeros: bool = False
) -> tuple[Weight, FusedInputs]:
    rng = generator(n, k, group, norm, residual, DTYPES.index(dtype))
    target = Target("cpu", EmulatedOps())
    weight = kernel_cases.make_weight(target, rng, n, k, group, dtype, with_zeros=zeros)
    return weight, make_fused_inputs(target, rng, 16, weight, dtype, norm=norm, residual=residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("norm", "residual"), [(True, False), (False, True), (True, True), (False, False)])
@pytest.mark.parametrize(("n", "k", "group"), [(17, 96, 32), (40, 576, 64), (33, 1152, 128)])
def test_linear(n: int, k: int, group: int, norm: bool, residual: bool, dtype: torch.dtype) -> None:
    weight, inputs = make(n, k, group, dtype, norm=norm, residual=residual, zeros=norm)
    full = inputs.linear(weight)
    check_fused_linear(inputs, weight, full)
    for m in ROWS:
        check_fused_rows(inputs, weight, slice(0, m), full)
    check_fused_rows(inputs, weight, slice(11, 12), full)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize(("n", "k", "group"), [(32, 96, 32), (96, 576, 64), (160, 256, 128)])
def test_swiglu(n: int, k: int, group: int, norm: bool, dtype: torch.dtype) -> None:
    weight, inputs = make(n, k, group, dtype, norm=norm, residual=False, zeros=norm)
    full = inputs.swiglu(weight)
    assert full.shape == (16, n // 2)
    check_swiglu(inputs, weight, full)
    for m in ROWS:
        check_fused_rows(inputs, weight, slice(0, m), full, gated=True)
    check_fused_rows(inputs, weight, slice(11, 12), full, gated=True)


def test_a_long_row() -> None:
    """More columns than a product normalizes itself, and than the norm's own kernel has in registers."""
    weight, inputs = make(16, 8320, 64, torch.bfloat16, norm=True, residual=True)
    full = inputs.rows(slice(0, 5)).linear(weight)
    check_fused_linear(inputs.rows(slice(0, 5)), weight, full)
    check_fused_rows(inputs, weight, slice(2, 3), full)


def test_without_norm_and_residual_it_is_the_plain_product() -> None:
    weight, inputs = make(40, 288, 32, torch.bfloat16, norm=False, residual=False)
    assert torch.equal(inputs.linear(weight), weight.linear(inputs.x, inputs.bias))


def test_the_norm_is_that_of_the_row_alone() -> None:
    """NaN and infinity in one row leave the others as they are."""
    weight, inputs = make(20, 128, 128, torch.float16, norm=True, residual=False)
    expected = inputs.linear(weight)
    inputs.x[3, 5], inputs.x[9, 100] = float("nan"), float("inf")
    out = inputs.linear(weight)
    others = [row for row in range(16) if row not in (3, 9)]
    assert torch.equal(out[others], expected[others])
    assert out[[3, 9]].isnan().all()


def test_rows_with_gaps_between_them() -> None:
    weight, inputs = make(20, 128, 64, torch.bfloat16, norm=True, residual=True)
    expected = inputs.linear(weight)
    spaced = FusedInputs(shifted(inputs.x, offset=8, extra=8), inputs.bias, inputs.norm_weight, inputs.residual)
    assert torch.equal(spaced.linear(weight), expected)
    for offset, extra in ((1, 8), (8, 4)):
        odd = FusedInputs(shifted(inputs.x, offset=offset, extra=extra), inputs.bias, inputs.norm_weight)
        with pytest.raises(KernelFault, match="CUDA error 716"):  # cudaErrorMisalignedAddress, by the launcher
            odd.linear(weight)
