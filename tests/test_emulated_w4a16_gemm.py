"""The int4 product of many rows: every variant of the CUDA kernels in the emulator, against float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from emulated import EmulatedOps
from emulator import needs_emulator
from kernel_cases import (
    DTYPES,
    Target,
    Weight,
    check_gemm,
    generator,
    make_weight,
    shifted,
    with_far_scales,
)

from hf_fastpath.ops.w4a16_gemm import VARIANTS

pytestmark = needs_emulator

ALL_VARIANTS = pytest.mark.parametrize("variant", range(len(VARIANTS)), ids=lambda i: f"variant{i}")
SHAPES = [  # (M, N, K, group): one row and more than a tile, odd N, tails of K (an odd number of tiles, half a tile)
    (1, 16, 32, 32),
    (17, 33, 96, 32),
    (65, 150, 288, 32),
    (33, 300, 192, 64),
    (130, 20, 448, 64),
    (64, 272, 128, 128),
    (20, 40, 1152, 128),
]


def on(sm_count: int, weight: Weight) -> Weight:
    """The same weight for a GPU of that many multiprocessors."""
    return dataclasses.replace(weight, target=Target("cpu", EmulatedOps(sm_count)))


def make(
    m: int, n: int, k: int, group: int, dtype: torch.dtype, with_zeros: bool
) -> tuple[Weight, torch.Tensor, torch.Tensor]:
    rng = generator(m, n, k, group, with_zeros, DTYPES.index(dtype))
    weight = make_weight(Target("cpu", EmulatedOps()), rng, n, k, group, dtype, with_zeros=with_zeros)
    return weight, torch.randn(m, k, generator=rng).to(dtype), torch.randn(n, generator=rng).to(dtype)


@ALL_VARIANTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", range(len(SHAPES)), ids=lambda i: str(SHAPES[i]))
def test_shapes(shape: int, dtype: torch.dtype, variant: int) -> None:
    """Every group size with zero points and without, in both dtypes: shapes take turns."""
    (m, n, k, group), with_zeros = SHAPES[shape], (shape + DTYPES.index(dtype)) % 2 == 1
    weight, x, bias = make(m, n, k, group, dtype, with_zeros)
    chosen_bias = bias if with_zeros else None
    check_gemm(x, weight, chosen_bias, weight.gemm(x, variant, chosen_bias), VARIANTS[variant])


@ALL_VARIANTS
def test_every_division_among_ctas(variant: int) -> None:
    """Tiles that are whole, halved and cut into single units; more CTAs than units; CTAs with several tiles."""
    weight, x, bias = make(70, 300, 640, 128, torch.bfloat16, True)
    for sm_count in (1, 2, 5, 7, 40):
        out = on(sm_count, weight).gemm(x, variant, bias)
        check_gemm(x, weight, bias, out, VARIANTS[variant])
        assert torch.equal(on(sm_count, weight).gemm(x, variant, bias), out)


@ALL_VARIANTS
@pytest.mark.parametrize(("n", "k", "group"), [(20, 288, 32), (20, 192, 64), (20, 256, 128)])
def test_shifted_views_give_the_same_bits(n: int, k: int, group: int, variant: int) -> None:
    weight, x, _ = make(35, n, k, group, torch.bfloat16, False)
    expected = weight.gemm(x, variant)
    for offset, extra in ((1, 3), (8, 8), (4, 8), (8, 1)):
        assert torch.equal(weight.gemm(shifted(x, offset=offset, extra=extra), variant), expected), (offset, extra)


@ALL_VARIANTS
@pytest.mark.parametrize(("m", "n", "k", "group"), [(65, 33, 288, 32), (20, 144, 256, 128)])
def test_a_residual_is_added_before_rounding(m: int, n: int, k: int, group: int, variant: int) -> None:
    weight, x, bias = make(m, n, k, group, torch.bfloat16, True)
    residual = 8 * torch.randn(m, n, generator=generator(m)).bfloat16()
    out = weight.gemm(x, variant, bias, residual)
    check_gemm(x, weight, bias, out, VARIANTS[variant], residual)
    apart = weight.gemm(x, variant, bias) + residual  # rounded twice
    assert not torch.equal(out, apart)


@ALL_VARIANTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_zeros", [False, True], ids=["symmetric", "zeros"])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_weights_are_those_of_dequantize(group: int, with_zeros: bool, dtype: torch.dtype, variant: int) -> None:
    """Bit by bit: rows of x that pick a column each. Every nibble meets every row of a packed tile."""
    rng = generator(group, with_zeros)
    weight = make_weight(Target("cpu", EmulatedOps()), rng, 48, 128, group, dtype, with_zeros=with_zeros)
    weight = with_far_scales(weight, rng)
    columns = torch.eye(128, dtype=dtype)
    assert torch.equal(weight.gemm(columns, variant).T, weight.dequantize())


@ALL_VARIANTS
def test_a_slice_of_row_tiles(variant: int) -> None:
    weight, x, _ = make(40, 80, 256, 32, torch.bfloat16, True)
    part = weight.row_tiles(1, 3, rows=30)
    check_gemm(x, part, None, part.gemm(x, variant), VARIANTS[variant])


@ALL_VARIANTS
def test_rows_are_kept_apart(variant: int) -> None:
    weight, x, _ = make(40, 40, 256, 128, torch.float16, False)
    expected = weight.gemm(x, variant)
    x[3, 5], x[37, 100] = float("nan"), float("inf")
    out = weight.gemm(x, variant)
    others = [row for row in range(40) if row not in (3, 37)]
    assert torch.equal(out[others], expected[others])
    assert out[3].isnan().all()


@ALL_VARIANTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_comparison_sees_one_flipped_nibble(dtype: torch.dtype, variant: int) -> None:
    weight, x, _ = make(20, 32, 96, 32, dtype, False)
    weight.qweight.view(-1)[77] ^= 8 << 12
    with pytest.raises(AssertionError, match="beyond their bound"):
        check_gemm(x, weight, None, weight.gemm(x, variant), VARIANTS[variant])
