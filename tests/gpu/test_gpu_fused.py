"""The fused int4 products on the GPU, against float64 and against transformers' modules."""

from __future__ import annotations

import fused_cases
import pytest
import torch
from fused_cases import EPS, FusedInputs, check_fused_linear, check_fused_rows, check_swiglu
from gpu_common import GPU, make_weight, poison
from kernel_cases import DTYPES, Weight, generator, shifted

from hf_fastpath.ops import w4a16_linear_fused, w4a16_swiglu

pytestmark = pytest.mark.gpu

# Beyond 4,096 columns, and beyond 8,192, the norm is computed otherwise.
SHAPES = [(32, 96, 32), (96, 576, 64), (224, 1152, 128), (512, 4096, 128), (64, 4224, 128), (32, 9216, 64)]


def make(
    n: int, k: int, group: int, dtype: torch.dtype, *, norm: bool, residual: bool, zeros: bool = False
) -> tuple[Weight, FusedInputs]:
    rng = generator(n, k, group, norm, residual, DTYPES.index(dtype))
    weight = make_weight(rng, n, k, group, dtype, with_zeros=zeros)
    return weight, fused_cases.make_fused_inputs(GPU, rng, 16, weight, dtype, norm=norm, residual=residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zeros"])
@pytest.mark.parametrize(("norm", "residual"), [(True, False), (False, True), (True, True), (False, False)])
@pytest.mark.parametrize(("n", "k", "group"), [*SHAPES, (17, 96, 32)])
def test_linear(n: int, k: int, group: int, norm: bool, residual: bool, zeros: bool, dtype: torch.dtype) -> None:
    weight, inputs = make(n, k, group, dtype, norm=norm, residual=residual, zeros=zeros)
    full = inputs.linear(weight)
    check_fused_linear(inputs, weight, full)
    for m in range(1, 17):
        poison(m, n, dtype=dtype)
        check_fused_rows(inputs, weight, slice(0, m), full)
    check_fused_rows(inputs, weight, slice(11, 12), full)
    if not norm and not residual:
        assert torch.equal(full, weight.linear(inputs.x, inputs.bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zeros"])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
def test_swiglu(n: int, k: int, group: int, norm: bool, zeros: bool, dtype: torch.dtype) -> None:
    weight, inputs = make(n, k, group, dtype, norm=norm, residual=False, zeros=zeros)
    full = inputs.swiglu(weight)
    check_swiglu(inputs, weight, full)
    for m in range(1, 17):
        poison(m, n // 2, dtype=dtype)
        check_fused_rows(inputs, weight, slice(0, m), full, gated=True)
    check_fused_rows(inputs, weight, slice(11, 12), full, gated=True)


def test_rows_with_gaps_between_them() -> None:
    weight, inputs = make(32, 128, 64, torch.bfloat16, norm=True, residual=True)
    expected = inputs.linear(weight)
    spaced = FusedInputs(shifted(inputs.x, offset=8, extra=8), inputs.bias, inputs.norm_weight, inputs.residual)
    assert torch.equal(spaced.linear(weight), expected)


def test_bad_arguments_are_refused_in_words() -> None:
    weight, inputs = make(32, 128, 32, torch.float16, norm=True, residual=True)
    x, packed, norm_weight = inputs.x, (weight.qweight, weight.scales, None, None), inputs.norm_weight
    assert norm_weight is not None
    residual = inputs.residual
    assert residual is not None
    linear: list[tuple[str, tuple[object, ...]]] = [
        ("takes up to 16 rows, got 17", (x[:1].expand(17, 128), *packed, None, EPS, None, 32, 32)),
        ("x must be aligned to 16 bytes", (shifted(x, offset=1), *packed, None, EPS, None, 32, 32)),
        ("row stride of x must be a multiple of 8, got 131", (shifted(x, offset=8), *packed, None, EPS, None, 32, 32)),
        ("norm_weight and x must have the same dtype", (x, *packed, norm_weight.float(), EPS, None, 32, 32)),
        (r"norm_weight must have shape \(K,\)", (x, *packed, norm_weight[:64], EPS, None, 32, 32)),
        ("eps must not be negative", (x, *packed, norm_weight, -1.0, None, 32, 32)),
        (r"residual must have shape \(M, N\)", (x, *packed, None, EPS, residual[:3], 32, 32)),
        ("residual must be contiguous", (x, *packed, None, EPS, residual.T.contiguous().T, 32, 32)),
    ]
    for message, args in linear:
        with pytest.raises(RuntimeError, match=message):
            w4a16_linear_fused(*args)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="intermediate_size must be a positive multiple of 16, got 8"):
        w4a16_swiglu(x, *packed, None, EPS, 8, 32)
    with pytest.raises(RuntimeError, match="qweight must have shape"):
        w4a16_swiglu(x, *packed, None, EPS, 32, 32)
