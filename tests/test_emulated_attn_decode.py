"""Decode attention over every format: the CUDA kernels in the emulator, against float64."""

from __future__ import annotations

from functools import partial

import attention_cases
import pytest
import torch
from attention_cases import FORMATS, FP8, Attention
from emulated import EmulatedOps
from emulator import needs_emulator
from kernel_cases import DTYPES, Target, generator, masks

from hf_fastpath import ops

pytestmark = needs_emulator

# From 129 on there are several CTAs.
LENGTHS = [0, 1, 15, 63, 64, 65, 255, 300, 1100]


def make_attention(*args: object, **options: object) -> Attention:
    return partial(attention_cases.make_attention, Target("cpu", EmulatedOps()))(*args, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("dim", "dtype"), [(64, DTYPES[1]), (80, DTYPES[0]), (128, DTYPES[1])])
def test_lengths_and_dimensions(form: str, length: int, dim: int, dtype: torch.dtype) -> None:
    for sharpness in (1.0, 6.0):
        case = make_attention(generator(length, dim), form, 4, 2, dim, [length], dtype, sharpness=sharpness)
        case.check(case.run())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 48, 96, 160, 192, 256])
def test_other_dimensions(form: str, dim: int, dtype: torch.dtype) -> None:
    for length in (33, 200):
        case = make_attention(generator(length, dim), form, 2, 1, dim, [length], dtype)
        case.check(case.run())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (6, 2), (7, 1), (8, 1), (9, 1), (20, 1)])
def test_ratios_of_heads(form: str, heads: int, kv_heads: int) -> None:
    for length in (33, 200):
        case = make_attention(generator(heads, length), form, heads, kv_heads, 64, [length, 7], torch.bfloat16)
        case.check(case.run())


@pytest.mark.parametrize("form", FORMATS)
def test_many_tiles_of_a_warp(form: str) -> None:
    for length in (2500, 9000):
        case = make_attention(generator(1), form, 2, 1, 64, [length], torch.float16)
        case.check(case.run())


@pytest.mark.parametrize(("group", "front"), [(32, 0), (32, 4), (32, 40), (64, 0), (64, 17)])
@pytest.mark.parametrize("length", [3, 17, 64, 81, 150])
def test_groups_and_first_tokens_of_int4(length: int, group: int, front: int) -> None:
    case = make_attention(generator(length, group), "int4", 4, 2, 96, [length], DTYPES[0], group=group, front=front)
    case.check(case.run())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("length", LENGTHS[1:])
def test_masks(form: str, length: int) -> None:
    rng = generator(length, 2)
    case = make_attention(rng, form, 2, 1, 64, [length] * 5, torch.float16)
    plain = case.run()
    wide = torch.ones(5, length + 9, dtype=torch.bool)  # a row stride that is not the length
    case.mask = wide
    assert torch.equal(case.run(), plain)
    wide[:, :length] = masks(rng, 5, length)
    for mask in (wide, wide[:, :length], wide[:, : length // 2 + 1]):  # beyond its columns nothing is attended
        case.mask = mask
        out = case.run()
        case.check(out)
        assert (out[3] == 0).all()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("window", [1, 60, 100, 2000])
def test_windows_softcap_and_sinks(form: str, window: int) -> None:
    rng = generator(window)
    for lengths in ([40, 300], [1100, 0]):
        case = make_attention(rng, form, 4, 2, 64, lengths, torch.bfloat16, sharpness=6.0)
        case.window = window
        case.check(case.run())
        case.softcap = 3.0
        case.check(case.run())
        case.sinks = torch.randn(4, generator=rng)
        case.check(case.run())
        case.mask = torch.rand(2, max(lengths), generator=rng) < 0.5
        case.check(case.run())


@pytest.mark.parametrize("form", FORMATS)
def test_a_rows_bits_depend_neither_on_its_batch_nor_on_the_capacity(form: str) -> None:
    case = make_attention(generator(4), form, 6, 2, 64, [300, 1, 1100, 300], torch.bfloat16)
    full = case.run()
    for rows in (slice(0, 1), slice(2, 3), slice(1, 4)):
        assert torch.equal(case.rows(rows).run(), full[rows])
    small = case.rows(slice(0, 1))
    roomy = make_attention(generator(4), form, 6, 2, 64, [300], torch.bfloat16, capacity=2048)
    for to, source in zip(roomy.storage[:-1], small.storage[:-1], strict=True):
        to[:, :, : source.shape[2]] = source
    roomy.query = small.query
    assert torch.equal(roomy.run(), full[:1])


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("length", [5, 64, 129, 300, 1100])
def test_a_length_that_the_kernel_before_changes_late(form: str, length: int) -> None:
    case = make_attention(generator(length), form, 4, 2, 64, [length, 1], torch.float16)
    expected = case.run()
    case.check(expected)
    for amount in (1, 5, 17, 64, 200, 5000, -1, -40, -100000):
        case.target.ops.assume_written_since(amount)
        try:
            assert torch.equal(case.run(), expected)
        finally:
            case.target.ops.assume_written_since(0)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (12, 1)])
def test_the_parts_are_added_by_whoever_is_last(form: str, heads: int, kv_heads: int) -> None:
    """In any order of the CTAs, and with the same tickets for rows of other lengths."""
    case = make_attention(generator(heads), form, heads, kv_heads, 64, [300, 1, 1700], torch.float16)
    expected = case.run()
    case.check(expected)
    try:
        for order in range(1, 5):
            case.target.ops.run_ctas_in_order(order)
            assert torch.equal(case.run(), expected)
    finally:
        case.target.ops.run_ctas_in_order(0)
    part = case.rows(slice(2, 3))
    assert part.tickets is case.tickets
    assert torch.equal(part.run(), expected[2:])


def test_scales_that_differ_widely() -> None:
    """An attention sink: the token with most of the weight has values a thousand times smaller than the others."""
    case = make_attention(generator(5), "int8", 8, 2, 64, [300], torch.bfloat16)
    k_data, k_scale, v_data, v_scale, _ = case.storage
    v_scale[:, :, 0] *= 1e-3
    k_data[:, :, 0] = 127 * case.query[:, ::4].sign().to(torch.int8)
    case.keys[:, :, 0] = k_data[:, :, 0].double() * k_scale[:, :, 0, None].double()
    case.values[:, :, 0] = v_data[:, :, 0].double() * v_scale[:, :, 0, None].double()
    case.check(case.run())
    v_scale[:, :, :300] = 0
    assert (case.run() == 0).all()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e4])
def test_queries_of_any_size(form: str, size: float) -> None:
    case = make_attention(generator(6), form, 4, 2, 128, [100], torch.bfloat16)
    case.query, case.scaling = case.query * size, case.scaling / size
    case.check(case.run())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("length", [40, 300])
def test_a_nan_in_a_query_is_not_hidden(form: str, length: int) -> None:
    case = make_attention(generator(13), form, 8, 2, 64, [length] * 2, torch.bfloat16)
    case.query[1, 3, 5] = float("nan")
    out = case.run()
    assert bool(out[1, 3].isnan().all())
    assert int(out.isnan().sum()) == 64


@pytest.mark.parametrize("form", FORMATS)
def test_the_comparison_sees_a_missing_token_and_one_wrong_value(form: str) -> None:
    case = make_attention(generator(8), form, 4, 1, 128, [257], torch.float16)
    case.storage[-1] -= 1
    with pytest.raises(AssertionError):
        case.check(case.run())
    case.storage[-1] += 1
    out = case.run()
    case.check(out)
    case.values[0, 0, 40, 77] += 4.0
    with pytest.raises(AssertionError, match="beyond their bound"):
        case.check(out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 64), (12, 1, 128), (8, 2, 80)])
@pytest.mark.parametrize(("slots", "seen"), [(48, 30), (208, 500), (320, 320)])
def test_h2o(slots: int, seen: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    """Against the reference in float32: its attention, what every slot got, and the padding that was counted."""
    rng = generator(slots, dim)
    shape = (2, kv_heads, slots)
    data = [(torch.randn(*shape, dim, generator=rng) * 30).to(FP8) for _ in range(2)]
    scales = [(2.0 ** torch.randint(-7, -4, shape, generator=rng)).half() for _ in range(2)]
    used = torch.rand(2, kv_heads, seen, generator=rng).argsort(-1)[..., :slots].int()
    positions = torch.nn.functional.pad(used, (0, slots - used.shape[2]), value=10**6)
    query = torch.randn(2, heads, dim, generator=rng).to(dtype)
    holes = torch.rand(2, seen + 3, generator=rng) < 0.6
    holes[:, seen - 1] = True
    padding = holes.clone()
    padding[0, :seen] = False
    for mask, first in ((None, 2), (holes, 2), (padding, seen - 1)):
        counts = torch.tensor([seen, first], dtype=torch.int32).expand(2, kv_heads, 2)
        storage = [data[0], scales[0], data[1], scales[1], torch.rand(shape, generator=rng), positions, counts]
        ours, reference = ([tensor.clone() for tensor in storage] for _ in range(2))
        out = EmulatedOps().attn_decode_h2o(query, ours, mask, dim**-0.5)
        exact = ops.attn_decode_h2o(query.float(), reference, mask, dim**-0.5)
        # Weights are rounded to fp16, the result once to the query's dtype.
        assert float((out - exact).norm()) <= (2.0**-11 + torch.finfo(dtype).eps / 2) * float(exact.norm())
        # The scores' weights add up to the number of heads in fp32.
        torch.testing.assert_close(ours[4], reference[4], rtol=1e-5, atol=1e-6 * heads)
        assert torch.equal(ours[6], reference[6])
