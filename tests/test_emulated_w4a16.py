"""The int4 product and dequantization: the CUDA kernels in the emulator, against float64 and the reference's bits."""

from __future__ import annotations

import kernel_cases
import pytest
import torch
from emulated import EmulatedOps
from emulator import needs_emulator
from kernel_cases import DTYPES, Target, Weight, check_linear, check_rows, generator, shifted

pytestmark = needs_emulator

SHAPES = [  # (N, K, group): odd numbers of rows, tails of K, fewer units of K than warps and more, several blocks a CTA
    (1, 32, 32),
    (17, 96, 32),
    (100, 288, 32),
    (64, 192, 64),
    (33, 576, 64),
    (48, 128, 128),
    (40, 1152, 128),
]
ROWS = (1, 2, 7, 8, 9, 15, 16)


def make(n: int, k: int, group: int, dtype: torch.dtype, with_zeros: bool) -> tuple[Weight, torch.Tensor, torch.Tensor]:
    rng = generator(n, k, group, with_zeros, DTYPES.index(dtype))
    target = Target("cpu", EmulatedOps())
    weight = kernel_cases.make_weight(target, rng, n, k, group, dtype, with_zeros=with_zeros)
    return weight, torch.randn(16, k, generator=rng).to(dtype), torch.randn(n, generator=rng).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_zeros", [False, True], ids=["symmetric", "zeros"])
@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
def test_linear_for_every_number_of_rows(n: int, k: int, group: int, with_zeros: bool, dtype: torch.dtype) -> None:
    weight, x, bias = make(n, k, group, dtype, with_zeros)
    chosen_bias = bias if with_zeros else None
    full = weight.linear(x, chosen_bias)
    check_linear(x, weight, chosen_bias, full)
    for m in ROWS:
        check_rows(x[:m], weight, chosen_bias, weight.linear(x[:m], chosen_bias), full[:m])
    check_rows(x[11:12], weight, chosen_bias, weight.linear(x[11:12], chosen_bias), full[11:12])


@pytest.mark.parametrize("with_zeros", [False, True], ids=["symmetric", "zeros"])
@pytest.mark.parametrize(("k", "group"), [(2048, 64), (4096, 128), (4128, 32), (5120, 128)])
def test_k_that_registers_hold_and_longer_ones(k: int, group: int, with_zeros: bool) -> None:
    """Up to 4,096 columns 16 rows of x stay in registers, in all blocks of outputs; beyond there are more chains."""
    weight, x, _ = make(130, k, group, torch.bfloat16, with_zeros)
    full = weight.linear(x)
    check_linear(x, weight, None, full)
    for m in (1, 8, 9):
        check_rows(x[:m], weight, None, weight.linear(x[:m]), full[:m])
    assert torch.equal(weight.linear(shifted(x[:9])), full[:9])


@pytest.mark.parametrize("m", [1, 3, 9])
@pytest.mark.parametrize(("n", "k", "group"), [(20, 288, 32), (20, 192, 64), (20, 256, 128)])
def test_linear_reads_shifted_views(m: int, n: int, k: int, group: int) -> None:
    weight, x, _ = make(n, k, group, torch.bfloat16, False)
    expected = weight.linear(x[:m])
    for offset, extra in ((1, 3), (8, 8), (4, 8), (8, 1)):
        out = weight.linear(shifted(x[:m], offset=offset, extra=extra))
        # The kernel for one row wants it aligned.
        check_linear(x[:m], weight, None, out)
        assert m == 1 or torch.equal(out, expected), (offset, extra)


@pytest.mark.parametrize("with_zeros", [False, True])
def test_a_slice_of_row_tiles_is_a_slice_of_the_result(with_zeros: bool) -> None:
    weight, x, _ = make(80, 256, 32, torch.bfloat16, with_zeros)
    part = weight.row_tiles(1, 3, rows=30)
    assert torch.equal(part.linear(x[:4]), weight.linear(x[:4])[:, 16:46])
    assert torch.equal(part.dequantize(), weight.dequantize()[16:46])


@pytest.mark.parametrize("rows", [1, 5])
def test_the_number_of_ctas_changes_no_bit(rows: int) -> None:
    weight, x, _ = make(80, 256, 64, torch.float16, True)
    results = []
    for sm_count in (1, 2, 100):
        target = Target("cpu", EmulatedOps(sm_count))
        results.append(Weight(**{**vars(weight), "target": target}).linear(x[:rows]))
    assert all(torch.equal(result, results[0]) for result in results)


def test_rows_are_kept_apart() -> None:
    weight, x, _ = make(40, 256, 128, torch.float16, False)
    expected = weight.linear(x)
    x[3, 5], x[9, 100] = float("nan"), float("inf")
    out = weight.linear(x)
    others = [row for row in range(16) if row not in (3, 9)]
    assert torch.equal(out[others], expected[others])
    assert out[3].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_zeros", [False, True], ids=["symmetric", "zeros"])
@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
def test_dequantize_has_the_references_bits(n: int, k: int, group: int, with_zeros: bool, dtype: torch.dtype) -> None:
    weight, _, _ = make(n, k, group, dtype, with_zeros)
    assert torch.equal(weight.dequantize(), weight.dequantize_on_cpu())


def test_dequantize_rounds_tiny_scales_like_the_reference() -> None:
    """Products that are subnormal in fp16, and scales of both signs."""
    weight, _, _ = make(64, 256, 32, torch.float16, True)
    weight.scales.mul_(1e-5)
    weight.scales[:, ::2].neg_()
    out, expected = weight.dequantize(), weight.dequantize_on_cpu()
    assert torch.equal(out.view(torch.int16), expected.view(torch.int16))
