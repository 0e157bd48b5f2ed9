"""Decode attention over the int8 cache on the GPU, against float64."""

from __future__ import annotations

import pytest
import torch
from gpu_common import DEVICE, GPU, make_attention, randn
from kernel_cases import DTYPES, Attention, generator, masks

from hf_fastpath.ops import attn_decode_int8, kv_int8_append

pytestmark = pytest.mark.gpu

LENGTHS = [1, 2, 63, 64, 65, 255, 256, 1000, 4097]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 48, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths_and_dimensions(length: int, dim: int, dtype: torch.dtype) -> None:
    for sharpness in (1.0, 6.0):
        case = make_attention(generator(length, dim), 2, 8, 2, dim, length, dtype, sharpness=sharpness)
        case.check(case.run())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(1, 1), (3, 3), (6, 2), (7, 1), (28, 4), (8, 1), (9, 1), (32, 2), (40, 1), (32, 8)]
)
@pytest.mark.parametrize("length", [33, 1500])
def test_ratios_of_heads(length: int, heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    case = make_attention(generator(heads, kv_heads, length), 3, heads, kv_heads, 64, length, dtype)
    case.check(case.run())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_masks(length: int, dtype: torch.dtype) -> None:
    rng = generator(length, 2)
    case = make_attention(rng, 5, 8, 2, 128, length, dtype)
    wide = torch.ones(5, length + 9, dtype=torch.bool, device=DEVICE)  # a row stride that is not the length
    wide[:, :length] = masks(rng, 5, length).to(DEVICE)
    for mask in (wide, wide[:, :length]):
        case.mask = mask
        out = case.run()
        case.check(out)
        assert (out[3] == 0).all()


def test_a_mask_of_all_true_changes_no_bit() -> None:
    case = make_attention(generator(3), 2, 8, 2, 128, 777, torch.bfloat16)
    plain = case.run()
    case.mask = torch.ones(2, 777, dtype=torch.bool, device=DEVICE)
    assert torch.equal(case.run(), plain)


@pytest.mark.parametrize("length", [40, 1000, 4097])
def test_a_rows_bits_do_not_depend_on_its_batch(length: int) -> None:
    case = make_attention(generator(length, 4), 9, 12, 4, 128, length, torch.bfloat16)
    full = case.run()
    assert torch.equal(full, case.run())  # nor on the run
    for rows in (slice(0, 1), slice(4, 5), slice(3, 9)):
        assert torch.equal(case.rows(rows).run(), full[rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales_that_differ_widely(dtype: torch.dtype) -> None:
    """An attention sink: the token with most of the weight has values a thousand times smaller than the others."""
    case = make_attention(generator(5), 2, 8, 2, 128, 300, dtype)
    case.v_scale[:, :, 0] *= 1e-3
    case.k_data[:, :, 0] = 127 * case.query[:, ::4].sign().to(torch.int8)
    case.check(case.run())
    case.v_scale[:, :, :300] = 0
    assert (case.run() == 0).all()


def test_a_query_that_starts_anywhere_gives_the_same_bits() -> None:
    case = make_attention(generator(11), 2, 8, 2, 80, 300, torch.bfloat16)
    expected = case.run()
    buffer = torch.zeros(case.query.numel() + 1, dtype=torch.bfloat16, device=DEVICE)
    case.query = buffer[1:].view(case.query.shape).copy_(case.query)
    assert torch.equal(case.run(), expected)


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e4])
def test_queries_of_any_size(size: float) -> None:
    case = make_attention(generator(6), 2, 8, 2, 128, 300, torch.bfloat16)
    case.query, case.scaling = case.query * size, case.scaling / size
    case.check(case.run())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_comparison_sees_one_wrong_value(dtype: torch.dtype) -> None:
    case = make_attention(generator(7), 1, 4, 1, 128, 65, dtype)
    out = case.run()
    case.v_data[0, 0, 40, 77] = -case.v_data[0, 0, 40, 77] - 64
    with pytest.raises(AssertionError, match="beyond their bound"):
        case.check(out)


def test_the_comparison_sees_a_missing_token() -> None:
    case = make_attention(generator(8), 1, 4, 1, 128, 257, torch.bfloat16)
    case.length = 256
    out = case.run()
    case.length = 257
    with pytest.raises(AssertionError):
        case.check(out)


def test_offsets_beyond_32_bits() -> None:
    """A cache of more than 2^31 elements: append at its end, then attend to all of it."""
    batch, kv_heads, dim, capacity = 2, 8, 128, 1_050_000
    assert batch * kv_heads * dim * capacity > 2**31
    rng = generator(9)
    shape = (batch, kv_heads, capacity)
    k_data, v_data = (torch.randint(-127, 128, (*shape, dim), dtype=torch.int8, device=DEVICE) for _ in range(2))
    k_scale, v_scale = (torch.full(shape, 1 / 127, dtype=torch.float16, device=DEVICE) for _ in range(2))
    new = randn(rng, batch, kv_heads, 2, dim, dtype=torch.bfloat16) * 8
    lengths = torch.full(shape[:2], capacity - 2, dtype=torch.int32, device=DEVICE)
    kv_int8_append(new, new, (k_data, k_scale, v_data, v_scale, lengths))
    restored = k_data[1, 7, -2:].float() * k_scale[1, 7, -2:, None].float()
    assert (restored - new[1, 7].float()).abs().max() <= float(k_scale[1, 7, -2:].max()) / 2 * 1.01
    query = randn(rng, batch, 32, dim, dtype=torch.bfloat16) * 4
    out = attn_decode_int8(query, k_data, k_scale, v_data, v_scale, None, capacity, dim**-0.5)
    last = (k_data[1:, 7:], k_scale[1:, 7:], v_data[1:, 7:], v_scale[1:, 7:])
    part = Attention(query[1:, 28:], *last, length=capacity, target=GPU, scaling=dim**-0.5)
    part.check(out[1:, 28:])


def test_bad_arguments_are_refused_in_words() -> None:
    case = make_attention(generator(10), 2, 8, 2, 64, 20, torch.float16)
    cache = (case.k_data, case.k_scale, case.v_data, case.v_scale)
    mask = torch.ones(2, 20, dtype=torch.bool, device=DEVICE)
    cases: list[tuple[str, tuple[object, ...]]] = [
        ("query must be float16 or bfloat16", (case.query.float(), *cache, None, 20, 1.0)),
        ("query must be contiguous", (case.query.transpose(0, 1).contiguous().transpose(0, 1), *cache, None, 20, 1.0)),
        ("multiples of 16 up to 256, got 40", (case.query[..., :40].contiguous(), *cache, None, 20, 1.0)),
        (
            "8 is not a multiple of H_kv 3",
            (case.query, *(t[:, :1].repeat_interleave(3, 1) for t in cache), None, 20, 1.0),
        ),
        ("k_data must have shape", (case.query[:1], *cache, None, 20, 1.0)),
        ("length must be in 1 to the capacity 25, got 26", (case.query, *cache, None, 26, 1.0)),
        ("length must be in 1 to the capacity 25, got 0", (case.query, *cache, None, 0, 1.0)),
        ("mask must be bool", (case.query, *cache, mask.int(), 20, 1.0)),
        ("at least length 20 columns, got 19", (case.query, *cache, mask[:, :19], 20, 1.0)),
        ("mask must have shape", (case.query, *cache, mask[:1], 20, 1.0)),
        ("mask must be on cuda:0", (case.query, *cache, mask.cpu(), 20, 1.0)),
    ]
    for message, args in cases:
        with pytest.raises(RuntimeError, match=message):
            attn_decode_int8(*args)  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [40, 1000])
def test_a_nan_in_a_query_is_not_hidden(length: int) -> None:
    case = make_attention(generator(13), 2, 8, 2, 64, length, torch.bfloat16)
    case.query[1, 3, 5] = float("nan")
    out = case.run()
    assert bool(out[1, 3].isnan().all())
    assert not bool(out[0].isnan().any())
