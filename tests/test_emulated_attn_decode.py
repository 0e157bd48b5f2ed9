"""Decode attention over the int8 cache: the CUDA kernels in the emulator, against float64."""

from __future__ import annotations

from functools import partial

import kernel_cases
import pytest
import torch
from emulated_ops import EmulatedOps
from emulator import needs_emulator
from kernel_cases import DTYPES, Attention, Target, generator, masks

pytestmark = needs_emulator

LENGTHS = [1, 2, 63, 64, 65, 255, 1025]  # from 65 on there are several splits, each with a last tile that is not full


def make_attention(*args: object, **options: float) -> Attention:
    return partial(kernel_cases.make_attention, Target("cpu", EmulatedOps()))(*args, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("dim", "dtype"), [(16, DTYPES[0]), (64, DTYPES[1]), (80, DTYPES[1]), (128, DTYPES[0])])
def test_lengths_and_dimensions(length: int, dim: int, dtype: torch.dtype) -> None:
    for sharpness in (1.0, 6.0):
        case = make_attention(generator(length, dim), 1, 4, 2, dim, length, dtype, sharpness=sharpness)
        case.check(case.run())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 100])
def test_the_largest_dimension(length: int, dtype: torch.dtype) -> None:
    case = make_attention(generator(length), 1, 2, 1, 256, length, dtype)
    case.check(case.run())


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (6, 2), (7, 1), (8, 1), (9, 1), (20, 1)])
@pytest.mark.parametrize("length", [33, 200])
def test_ratios_of_heads(length: int, heads: int, kv_heads: int) -> None:
    case = make_attention(generator(heads, kv_heads, length), 2, heads, kv_heads, 48, length, torch.bfloat16)
    case.check(case.run())


@pytest.mark.parametrize("length", LENGTHS)
def test_masks(length: int) -> None:
    rng = generator(length, 2)
    case = make_attention(rng, 5, 2, 1, 64, length, torch.float16)
    wide = torch.ones(5, length + 9, dtype=torch.bool)  # a row stride that is not the length
    wide[:, :length] = masks(rng, 5, length)
    case.mask = wide[:, :length]
    out = case.run()
    case.check(out)
    assert (out[3] == 0).all()
    case.mask = None
    plain = case.run()
    case.mask = torch.ones(5, length, dtype=torch.bool)
    assert torch.equal(case.run(), plain)


@pytest.mark.parametrize("length", [40, 300])
def test_a_rows_bits_do_not_depend_on_its_batch(length: int) -> None:
    case = make_attention(generator(length, 4), 4, 6, 2, 64, length, torch.bfloat16)
    full = case.run()
    for rows in (slice(0, 1), slice(2, 3), slice(1, 4)):
        assert torch.equal(case.rows(rows).run(), full[rows])


def test_scales_that_differ_widely() -> None:
    """An attention sink: the token with most of the weight has values a thousand times smaller than the others."""
    case = make_attention(generator(5), 1, 8, 2, 64, 300, torch.bfloat16)
    case.v_scale[:, :, 0] *= 1e-3
    case.k_data[:, :, 0] = 127 * case.query[:, ::4].sign().to(torch.int8)
    case.check(case.run())
    case.v_scale[:, :, :300] = 0
    assert (case.run() == 0).all()


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e4])
def test_queries_of_any_size(size: float) -> None:
    case = make_attention(generator(6), 1, 4, 2, 128, 100, torch.bfloat16)
    case.query, case.scaling = case.query * size, case.scaling / size
    case.check(case.run())


@pytest.mark.parametrize("length", [40, 300])
def test_a_nan_in_a_query_is_not_hidden(length: int) -> None:
    case = make_attention(generator(13), 2, 8, 2, 64, length, torch.bfloat16)
    case.query[1, 3, 5] = float("nan")
    out = case.run()
    assert bool(out[1, 3].isnan().all())
    assert not bool(out[0].isnan().any())
