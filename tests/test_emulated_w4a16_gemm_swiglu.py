"""SwiGLU of the int4 product of many rows: the CUDA kernels in the emulator, against the product and SwiGLU apart."""

from __future__ import annotations

import pytest
import torch
from emulated import EmulatedOps
from emulator import KernelFault, needs_emulator
from kernel_cases import DTYPES, Target, Weight, generator, make_weight, shifted

from hf_fastpath.heuristics import w4a16_gemm_swiglu_has
from hf_fastpath.ops.w4a16_gemm import VARIANTS

pytestmark = needs_emulator

WITH_KERNEL = [i for i in range(len(VARIANTS)) if w4a16_gemm_swiglu_has(i)]
ALL_VARIANTS = pytest.mark.parametrize("variant", WITH_KERNEL, ids=lambda i: f"variant{i}")
SHAPES = [  # (M, I, K, group): one row, odd rows, more than a tile; I beside multiples of 64; tails of K
    (1, 16, 32, 32),
    (17, 48, 96, 32),
    (65, 80, 288, 32),
    (33, 144, 192, 64),
    (70, 64, 448, 64),
    (64, 112, 128, 128),
    (21, 32, 1152, 128),
]


def on(sm_count: int) -> Target:
    return Target("cpu", EmulatedOps(sm_count))


def apart(weight: Weight, x: torch.Tensor, variant: int, bias: torch.Tensor | None) -> torch.Tensor:
    return weight.target.ops.swiglu(weight.gemm(x, variant, bias))


@ALL_VARIANTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", range(len(SHAPES)), ids=lambda i: str(SHAPES[i]))
def test_the_bits_of_the_product_and_swiglu(shape: int, dtype: torch.dtype, variant: int) -> None:
    """Every group size with zero points and without, in both dtypes: shapes take turns."""
    (m, half, k, group), with_zeros = SHAPES[shape], (shape + DTYPES.index(dtype)) % 2 == 1
    rng = generator(m, half, k, group, with_zeros, DTYPES.index(dtype))
    weight = make_weight(on(3), rng, 2 * half, k, group, dtype, with_zeros=with_zeros)
    x = torch.randn(m, k, generator=rng).to(dtype)
    bias = torch.randn(2 * half, generator=rng).to(dtype) if with_zeros else None
    out = weight.gemm_swiglu(x, variant, bias)
    assert out.shape == (m, half)
    assert torch.equal(out, apart(weight, x, variant, bias))


@ALL_VARIANTS
@pytest.mark.parametrize("sm_count", [1, 2, 40])
def test_every_division_among_ctas(sm_count: int, variant: int) -> None:
    """CTAs with several tiles, which leave each other their sums in the same memory, and with one."""
    rng = generator(sm_count)
    weight = make_weight(on(sm_count), rng, 2 * 208, 384, 128, torch.bfloat16, with_zeros=True)
    x = torch.randn(70, 384, generator=rng).bfloat16()
    assert torch.equal(weight.gemm_swiglu(x, variant), apart(weight, x, variant, None))


@ALL_VARIANTS
def test_shifted_views_give_the_same_bits(variant: int) -> None:
    rng = generator(7)
    weight = make_weight(on(3), rng, 96, 192, 64, torch.bfloat16)
    x = torch.randn(35, 192, generator=rng).bfloat16()
    expected = weight.gemm_swiglu(x, variant)
    for offset, extra in ((1, 3), (8, 8)):
        assert torch.equal(weight.gemm_swiglu(shifted(x, offset=offset, extra=extra), variant), expected)


@pytest.mark.parametrize("variant", [i for i in range(len(VARIANTS)) if i not in WITH_KERNEL])
def test_other_variants_are_refused(variant: int) -> None:
    weight = make_weight(on(3), generator(8), 32, 64, 64, torch.bfloat16)
    with pytest.raises(KernelFault, match="refused: CUDA error 1"):
        weight.gemm_swiglu(torch.zeros(20, 64).bfloat16(), variant)
