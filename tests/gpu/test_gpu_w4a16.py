"""The int4 product and dequantization on the GPU, against float64 and against the reference's bits."""

from __future__ import annotations

import pytest
import torch
from gpu_common import DEVICE, make_weight, poison, randn
from kernel_cases import DTYPES, check_linear, check_rows, generator, shifted

from hf_fastpath.ops import w4a16_linear

pytestmark = pytest.mark.gpu

SHAPES = [  # (N, K, group): odd numbers of rows, tails of K, fewer units of K than warps, several blocks a CTA
    (1, 32, 32),
    (17, 96, 32),
    (100, 288, 32),
    (64, 192, 64),
    (100, 576, 64),
    (48, 128, 128),
    (100, 1152, 128),
    (257, 4096, 128),
    (9000, 256, 128),
    (9000, 2048, 128),  # several blocks a CTA, whose rows of x stay in registers
    (9000, 4160, 32),  # too long for that
    (80, 14336, 128),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_zeros", [False, True], ids=["symmetric", "zeros"])
@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
def test_linear_for_every_number_of_rows(n: int, k: int, group: int, with_zeros: bool, dtype: torch.dtype) -> None:
    rng = generator(n, k, group, with_zeros, DTYPES.index(dtype))
    weight = make_weight(rng, n, k, group, dtype, with_zeros=with_zeros)
    bias = randn(rng, n, dtype=dtype) if with_zeros else None
    x = randn(rng, 16, k, dtype=dtype)
    full = weight.linear(x, bias)
    check_linear(x, weight, bias, full)
    for m in range(1, 17):
        poison(m, n, dtype=dtype)
        out = weight.linear(x[:m], bias)
        assert out.shape == (m, n)
        check_rows(x[:m], weight, bias, out, full[:m])  # the same bits whatever the number of rows
    # ... and whatever the row's place among them.
    check_rows(x[11:12], weight, bias, weight.linear(x[11:12], bias), full[11:12])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k", "group"), [(100, 288, 32), (100, 576, 64), (48, 1024, 128)])
@pytest.mark.parametrize("m", [1, 3, 8, 9, 16])
def test_linear_reads_shifted_views(m: int, n: int, k: int, group: int, dtype: torch.dtype) -> None:
    rng = generator(m, n, k)
    weight = make_weight(rng, n, k, group, dtype)
    x = randn(rng, m, k, dtype=dtype)
    expected = weight.linear(x)
    for offset, extra in ((1, 3), (8, 8), (4, 8), (8, 1)):
        out = weight.linear(shifted(x, offset=offset, extra=extra))
        check_linear(x, weight, None, out)  # the kernel for one row wants it aligned
        assert m == 1 or torch.equal(out, expected), (offset, extra)


@pytest.mark.parametrize("with_zeros", [False, True])
def test_linear_of_a_row_slice_is_a_slice_of_the_result(with_zeros: bool) -> None:
    rng = generator(5)
    weight = make_weight(rng, 80, 256, 32, torch.bfloat16, with_zeros=with_zeros)
    x = randn(rng, 4, 256, dtype=torch.bfloat16)
    full = weight.linear(x)
    part = weight.row_tiles(1, 3, rows=30)
    assert torch.equal(part.linear(x), full[:, 16:46])
    assert torch.equal(part.dequantize(), weight.dequantize()[16:46])


def test_linear_gives_the_same_bits_every_time() -> None:
    rng = generator(6)
    weight = make_weight(rng, 6144, 4096, 128, torch.bfloat16)
    for m in (1, 16):
        x = randn(rng, m, 4096, dtype=torch.bfloat16)
        first = weight.linear(x)
        check_linear(x, weight, None, first)
        for _ in range(20):
            assert torch.equal(weight.linear(x), first)


def test_linear_keeps_rows_apart() -> None:
    """NaN and infinity in one row of x leave the others as they are."""
    rng = generator(7)
    weight = make_weight(rng, 64, 512, 128, torch.float16)
    x = randn(rng, 12, 512, dtype=torch.float16)
    expected = weight.linear(x)
    x[3, 5], x[9, 100] = float("nan"), float("inf")
    out = weight.linear(x)
    others = [row for row in range(12) if row not in (3, 9)]
    assert torch.equal(out[others], expected[others])
    assert out[3].isnan().all()


def test_linear_of_no_rows() -> None:
    weight = make_weight(generator(8), 20, 64, 64, torch.float16)
    x = torch.empty(0, 64, dtype=torch.float16, device=DEVICE)
    assert weight.linear(x).shape == (0, 20)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_comparison_sees_one_flipped_nibble(dtype: torch.dtype) -> None:
    rng = generator(9)
    weight = make_weight(rng, 32, 96, 32, dtype)
    x = randn(rng, 5, 96, dtype=dtype)
    weight.qweight.view(-1)[77] ^= 8 << 12
    with pytest.raises(AssertionError, match="beyond their bound"):
        check_linear(x, weight, None, weight.linear(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_zeros", [False, True], ids=["symmetric", "zeros"])
@pytest.mark.parametrize(("n", "k", "group"), [*SHAPES, (4096, 1024, 128)])
def test_dequantize_has_the_references_bits(n: int, k: int, group: int, with_zeros: bool, dtype: torch.dtype) -> None:
    weight = make_weight(generator(n, k, 3), n, k, group, dtype, with_zeros=with_zeros)
    poison(n, k, dtype=dtype)
    assert torch.equal(weight.dequantize().cpu(), weight.dequantize_on_cpu())


def test_dequantize_rounds_tiny_scales_like_the_reference() -> None:
    """Products that are subnormal in fp16, and scales of both signs."""
    weight = make_weight(generator(10), 64, 256, 32, torch.float16, with_zeros=True)
    weight.scales.mul_(1e-5)
    weight.scales[:, ::2].neg_()
    out, expected = weight.dequantize().cpu(), weight.dequantize_on_cpu()
    assert torch.equal(out.view(torch.int16), expected.view(torch.int16))


def test_bad_arguments_are_refused_in_words() -> None:
    weight = make_weight(generator(11), 40, 128, 32, torch.float16)
    x = randn(generator(12), 4, 128, dtype=torch.float16)
    qweight, scales = weight.qweight, weight.scales
    cases: list[tuple[str, tuple[object, ...]]] = [
        ("takes up to 16 rows, got 17", (x[:1].expand(17, 128), qweight, scales, None, None, 40, 32)),
        ("x must have shape", (x[0], qweight, scales, None, None, 40, 32)),
        ("contiguous in its last dimension", (x.T.contiguous().T, qweight, scales, None, None, 40, 32)),
        ("x and scales must have the same dtype", (x.bfloat16(), qweight, scales, None, None, 40, 32)),
        ("scales must be float16 or bfloat16", (x, qweight, scales.float(), None, None, 40, 32)),
        ("group_size must be 32, 64 or 128, got 16", (x, qweight, scales, None, None, 40, 16)),
        ("multiple of group_size", (x[:, :100], qweight, scales, None, None, 40, 32)),
        ("qweight must have shape", (x, qweight, scales, None, None, 100, 32)),
        ("qweight must be int32", (x, qweight.long(), scales, None, None, 40, 32)),
        ("scales must have shape", (x, qweight, scales[:, :2], None, None, 40, 32)),
        ("zeros must be uint8", (x, qweight, scales, scales, None, 40, 32)),
        ("bias must have shape", (x, qweight, scales, None, x[0], 40, 32)),
        ("scales must be on cuda:0", (x, qweight, scales.cpu(), None, None, 40, 32)),
    ]
    for message, args in cases:
        with pytest.raises(RuntimeError, match=message):
            w4a16_linear(*args)  # type: ignore[arg-type]
