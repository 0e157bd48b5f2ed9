"""A mixture of 16-bit experts: the CUDA kernels in the emulator, against float64."""

from __future__ import annotations

import pytest
import torch
from emulated import EmulatedOps
from emulator import KernelFault, needs_emulator
from kernel_cases import DTYPES, Target, generator
from moe16_cases import check_experts, make_mixture

pytestmark = needs_emulator


def target(sm_count: int = 3) -> Target:
    return Target("cpu", EmulatedOps(sm_count))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "top_k", "count", "used", "sizes", "residual"),
    [
        (1, 4, 5, None, (256, 128), False),
        (3, 2, 4, 3, (96, 160), True),
        (8, 3, 4, None, (512, 64), False),  # slots of up to eight rows
        (9, 2, 3, None, (32, 32), True),  # and of up to sixteen, with a K that only one warp has
        (11, 2, 4, 2, (1056, 32), False),  # all rows on the same two experts
        (19, 1, 2, 1, (64, 96), True),  # more than a slot holds
        (2, 2, 3, None, (128, 2208), True),  # a K of which not all is held in registers
        (10, 2, 2, None, (4160, 32), False),  # so of slots of up to sixteen rows, in three passes
    ],
)
def test_the_experts(
    rows: int, top_k: int, count: int, used: int | None, sizes: tuple[int, int], residual: bool, dtype: torch.dtype
) -> None:
    rng = generator(rows, top_k, *sizes, DTYPES.index(dtype))
    mixture = make_mixture(target(), rng, rows, top_k, count, sizes, dtype, used=used, residual=residual)
    full = mixture.run()
    check_experts(mixture, full)
    for part in (slice(0, 1), slice(rows - 1, rows), slice(0, min(rows, 5))):
        assert torch.equal(mixture.rows(part).run(), full[part])


def test_a_gpu_of_another_size_gives_the_same_bits() -> None:
    mixture = make_mixture(target(1), generator(3), 10, 3, 5, (192, 96), torch.bfloat16, residual=True)
    expected = mixture.run()
    for sm_count in (2, 7, 200):
        mixture.target.ops.sm_count = sm_count
        assert torch.equal(mixture.run(), expected)


@pytest.mark.parametrize("rows", [3, 12])
def test_a_gpu_with_less_shared_memory_gives_the_same_bits(rows: int) -> None:
    mixture = make_mixture(target(), generator(rows), rows, 2, 3, (608, 96), torch.bfloat16, residual=True)
    expected = mixture.run()
    mixture.target.ops.limit_shared_memory(99 * 1024)  # of compute capability 8.9
    try:
        assert torch.equal(mixture.run(), expected)
    finally:
        mixture.target.ops.limit_shared_memory(227 * 1024)


def test_more_pairs_than_one_launch_takes() -> None:
    mixture = make_mixture(target(), generator(0), 90, 3, 4, (64, 32), torch.bfloat16, residual=True)
    full = mixture.run()
    check_experts(mixture, full)
    assert torch.equal(mixture.rows(slice(83, 90)).run(), full[83:])


def test_what_no_row_chose_is_not_read() -> None:
    mixture = make_mixture(target(), generator(4), 10, 2, 5, (64, 32), torch.bfloat16, used=4)
    expected = mixture.run()
    mixture.gate_up[4], mixture.down[4] = float("nan"), float("nan")
    assert torch.equal(mixture.run(), expected)


@pytest.mark.parametrize("expert", [-1, 4])
def test_an_expert_that_there_is_not_ends_the_kernel(expert: int) -> None:
    mixture = make_mixture(target(), generator(1), 2, 2, 4, (64, 32), torch.float16)
    mixture.experts[1, 1] = expert
    with pytest.raises(KernelFault, match="__trap"):
        mixture.run()
