"""What is between a layer's products: the CUDA kernels in the emulator."""

from __future__ import annotations

import pytest
import torch
from emulated import EmulatedOps
from emulator import KernelFault, needs_emulator
from kernel_cases import DTYPES, Target, generator
from layer_cases import NORM_SHAPES, SWIGLU_SHAPES, check_norm, check_norms, check_swiglu_op, norm_inputs
from rotary_cases import DTYPES as ANGLE_DTYPES
from rotary_cases import SHAPES as ANGLE_SHAPES
from rotary_cases import check_angles, frequencies, positions_of

from hf_fastpath.ops._rms_norm import rms_norm as reference_norm

pytestmark = needs_emulator


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), NORM_SHAPES)
def test_norms(rows: int, columns: int, dtype: torch.dtype) -> None:
    target = Target("cpu", EmulatedOps())
    check_norms(target, *norm_inputs(target, generator(rows, columns, DTYPES.index(dtype)), rows, columns, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), SWIGLU_SHAPES)
def test_swiglu(rows: int, columns: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, 2 * columns, generator=generator(rows, columns, DTYPES.index(dtype))) * 3
    x[0, 0], x[0, 1] = -100.0, 0.0
    x = x.to(dtype)
    check_swiglu_op(x, EmulatedOps().swiglu(x))


@pytest.mark.parametrize("dtype", ANGLE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", ANGLE_SHAPES, ids=str)
def test_rope_angles(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    positions, inv_freq = positions_of(generator(*shape), *shape[:2]), frequencies(shape[2])
    for scaling in (1.0, 1.25):
        found = EmulatedOps().rope_angles(positions, inv_freq, scaling, torch.empty(0, dtype=dtype))
        check_angles(positions, inv_freq, scaling, found, dtype)


@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (3, 1032), (16, 1024)])
def test_embedding_rows(rows: int, columns: int) -> None:
    weight = torch.randn(50, columns).bfloat16()
    ids = torch.randint(0, 50, (rows,), generator=generator(rows, columns))
    assert torch.equal(EmulatedOps().embedding_rows(ids, weight), weight[ids])
    for beyond in (-1, 50):
        ids[-1] = beyond
        with pytest.raises(KernelFault):
            EmulatedOps().embedding_rows(ids, weight)


def test_the_check_of_the_norm_sees_a_fault() -> None:
    target = Target("cpu", EmulatedOps())
    x, _, weight = norm_inputs(target, generator(5), 3, 96, torch.bfloat16)
    out = reference_norm(x, weight, 1e-5)
    check_norm(x, weight, out)
    out[0, 5] *= 1.02
    with pytest.raises(AssertionError, match="beyond their bound"):
        check_norm(x, weight, out)


def test_a_row_that_is_not_aligned_is_a_fault() -> None:
    target = Target("cpu", EmulatedOps())
    x, _, weight = norm_inputs(target, generator(6), 3, 96, torch.bfloat16)
    with pytest.raises(KernelFault):
        target.ops.rms_norm(x[:, 4:92], weight[:88].contiguous(), 1e-5)
