"""A mixture's router and experts: the CUDA kernels in the emulator, against float64."""

from __future__ import annotations

import pytest
import torch
from emulated import EmulatedOps
from emulator import KernelFault, needs_emulator
from kernel_cases import DTYPES, Target, generator
from moe_cases import check_experts, check_norm, check_router, check_rows, make_mixture

from hf_fastpath.ops.moe_experts import VARIANTS

pytestmark = needs_emulator


def target() -> Target:
    return Target("cpu", EmulatedOps())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "hidden", "count", "top_k", "biased", "normalize"),
    [
        (1, 128, 8, 2, True, True),
        (9, 96, 32, 4, True, True),
        (19, 2080, 5, 5, False, True),
        (3, 32, 70, 8, True, False),
    ],
)
def test_the_router(
    rows: int, hidden: int, count: int, top_k: int, biased: bool, normalize: bool, dtype: torch.dtype
) -> None:
    rng = generator(rows, hidden, count, DTYPES.index(dtype))
    x = torch.randn(rows, hidden, generator=rng).to(dtype)
    weight = (torch.randn(count, hidden, generator=rng) / hidden**0.5).to(dtype)
    bias = torch.randn(count, generator=rng) / 4 if biased else None
    got = target().ops.moe_router(x, weight, bias, top_k, normalize, 1.5)
    check_router(x, weight, bias, top_k, normalize, 1.5, got)
    for row in (0, rows - 1):
        alone = target().ops.moe_router(x[row : row + 1].clone(), weight, bias, top_k, normalize, 1.5)
        for one, all_rows in zip(alone, got, strict=True):
            assert torch.equal(one[0], all_rows[row])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "hidden", "count", "top_k"), [(1, 128, 8, 2), (11, 2080, 33, 4), (5, 96, 70, 8)], ids=str
)
def test_the_router_behind_a_norm(rows: int, hidden: int, count: int, top_k: int, dtype: torch.dtype) -> None:
    rng = generator(rows, hidden, count, DTYPES.index(dtype))
    x = (3 * torch.randn(rows, hidden, generator=rng)).to(dtype)
    norm = (torch.rand(hidden, generator=rng) + 0.5).to(dtype)
    weight = (torch.randn(count, hidden, generator=rng) / hidden**0.5).to(dtype)
    normalized, shares, experts = target().ops.moe_norm_router(x, norm, 1e-5, weight, None, top_k, True, 1.5)
    check_norm(x, norm, 1e-5, normalized)
    _, expected_shares, expected = target().ops.moe_router(normalized, weight, None, top_k, True, 1.5)
    assert torch.equal(experts, expected)
    assert torch.equal(shares, expected_shares)
    alone = target().ops.moe_norm_router(x[-1:].clone(), norm, 1e-5, weight, None, top_k, True, 1.5)
    for one, all_rows in zip(alone, (normalized, shares, experts), strict=True):
        assert torch.equal(one[0], all_rows[-1])


def test_of_equal_scores_the_first_expert_is_taken_and_a_nan_before_all() -> None:
    x, weight = torch.zeros(2, 64, dtype=torch.bfloat16), torch.randn(40, 64).bfloat16()
    x[1, 3] = 1
    weight[:, 3], weight[7, 3], weight[30, 3] = 0, float("nan"), 1
    _, _, experts = target().ops.moe_router(x, weight, None, 3, True, 1.0)
    assert experts.tolist() == [[7, 0, 1], [7, 30, 0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "top_k", "count", "used", "sizes", "groups", "zeros"),
    [
        (1, 4, 5, None, (256, 128), (128, 128), True),
        (1, 3, 4, None, (384, 1152), (64, 32), False),  # one row: warps without a unit, and with more than one
        (1, 16, 17, None, (128, 128), (32, 64), True),
        (3, 2, 4, 3, (96, 160), (32, 32), True),
        (5, 3, 4, None, (512, 256), (128, 64), True),  # whole units of columns: the plain form
        (2, 2, 3, None, (256, 512), (32, 128), False),
        (7, 3, 6, None, (192, 64), (64, 64), False),
        (16, 4, 6, None, (128, 1184), (128, 32), True),  # ten units in chains of two
        (11, 2, 4, 2, (1152, 32), (128, 32), False),  # all rows on the same two experts: more than a slot holds
        (40, 4, 6, None, (256, 256), (128, 128), True),  # more pairs than a round of the second kernel has
    ],
)
def test_the_experts(
    rows: int,
    top_k: int,
    count: int,
    used: int | None,
    sizes: tuple[int, int],
    groups: tuple[int, int],
    zeros: bool,
    dtype: torch.dtype,
) -> None:
    rng = generator(rows, top_k, *sizes, DTYPES.index(dtype))
    residual = rows % 2 == 1
    mixture = make_mixture(
        target(), rng, rows, top_k, count, sizes, groups, dtype, zeros=zeros, used=used, residual=residual
    )
    full = mixture.run()
    check_experts(mixture, full, VARIANTS[0])
    for part in (slice(0, 1), slice(rows - 1, rows), slice(0, min(rows, 5))):
        check_rows(mixture.rows(part), mixture.rows(part).run(), full[part], VARIANTS[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", range(1, len(VARIANTS)), ids=lambda i: VARIANTS[i].name)
@pytest.mark.parametrize(
    ("rows", "top_k", "count", "used", "sizes", "groups", "zeros"),
    [
        (1, 2, 4, None, (256, 128), (128, 128), True),
        (67, 2, 3, 2, (96, 160), (32, 32), True),
        (50, 3, 5, None, (192, 64), (64, 64), False),
    ],
)
def test_many_rows(
    variant: int,
    rows: int,
    top_k: int,
    count: int,
    used: int | None,
    sizes: tuple[int, int],
    groups: tuple[int, int],
    zeros: bool,
    dtype: torch.dtype,
) -> None:
    rng = generator(rows, top_k, *sizes, DTYPES.index(dtype))
    residual = rows % 2 == 1
    mixture = make_mixture(
        target(), rng, rows, top_k, count, sizes, groups, dtype, zeros=zeros, used=used, residual=residual
    )
    check_experts(mixture, mixture.run(variant), VARIANTS[variant])


def test_more_pairs_than_one_launch_takes() -> None:
    mixture = make_mixture(target(), generator(0), 90, 3, 4, (64, 32), (64, 32), torch.bfloat16, residual=True)
    full = mixture.run()
    check_experts(mixture, full, VARIANTS[0])
    assert torch.equal(mixture.rows(slice(83, 90)).run(), full[83:])


def test_a_row_with_as_many_experts_as_a_launch_takes() -> None:
    mixture = make_mixture(target(), generator(2), 1, 256, 257, (32, 32), (32, 32), torch.bfloat16, residual=True)
    check_experts(mixture, mixture.run(), VARIANTS[0])


@pytest.mark.parametrize("expert", [-1, 4])
def test_an_expert_that_there_is_not_ends_the_kernel(expert: int) -> None:
    mixture = make_mixture(target(), generator(1), 2, 2, 4, (64, 32), (64, 32), torch.float16)
    mixture.experts[1, 1] = expert
    with pytest.raises(KernelFault, match="__trap"):
        mixture.run()
