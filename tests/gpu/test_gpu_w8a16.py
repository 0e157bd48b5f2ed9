"""The int8 product and dequantization on the GPU, against float64 and against the reference's bits."""

from __future__ import annotations

import fused_cases
import pytest
import torch
from fused_cases import Int8Weight, check_int8_linear
from gpu_common import DEVICE, GPU, poison, randn
from kernel_cases import DTYPES, generator, shifted

from hf_fastpath.ops import w8a16_dequantize, w8a16_linear
from hf_fastpath.packing_int8 import dequantize_int8

pytestmark = pytest.mark.gpu

SHAPES = [(1, 32), (17, 96), (100, 288), (64, 64), (100, 1056), (257, 4096), (9000, 256)]


def make(n: int, k: int, dtype: torch.dtype) -> tuple[Int8Weight, torch.Tensor, torch.Tensor]:
    rng = generator(n, k, DTYPES.index(dtype))
    weight = fused_cases.make_int8_weight(GPU, rng, n, k, dtype)
    return weight, randn(rng, 16, k, dtype=dtype), randn(rng, n, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_linear_for_every_number_of_rows(n: int, k: int, with_bias: bool, dtype: torch.dtype) -> None:
    weight, x, bias = make(n, k, dtype)
    chosen = bias if with_bias else None
    full = weight.linear(x, chosen)
    check_int8_linear(x, weight, chosen, full)
    for m in range(1, 17):
        poison(m, n, dtype=dtype)
        assert torch.equal(weight.linear(x[:m], chosen), full[:m])
    assert torch.equal(weight.linear(x[11:12], chosen), full[11:12])


@pytest.mark.parametrize("m", [1, 3, 8, 9, 16])
def test_linear_reads_shifted_views(m: int) -> None:
    weight, x, _ = make(100, 288, torch.float16)
    expected = weight.linear(x[:m])
    for offset, extra in ((1, 3), (8, 8), (4, 8), (8, 1)):
        assert torch.equal(weight.linear(shifted(x[:m], offset=offset, extra=extra)), expected), (offset, extra)


def test_the_head_of_a_large_vocabulary() -> None:
    weight, x, _ = make(128_256, 512, torch.bfloat16)
    for m in (1, 16):
        first = weight.linear(x[:m])
        check_int8_linear(x[:m], weight, None, first)
        for _ in range(5):
            assert torch.equal(weight.linear(x[:m]), first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_dequantize_has_the_references_bits(n: int, k: int, dtype: torch.dtype) -> None:
    weight, _, _ = make(n, k, dtype)
    weight.scales[::3] *= 1e-4  # subnormal products in fp16
    weight.scales[::2].neg_()
    poison(n, k, dtype=dtype)
    expected = dequantize_int8(weight.qweight.cpu(), weight.scales.cpu(), n)
    assert torch.equal(weight.dequantize().cpu().view(torch.int16), expected.view(torch.int16))


def test_bad_arguments_are_refused_in_words() -> None:
    weight, x, bias = make(40, 128, torch.float16)
    qweight, scales = weight.qweight, weight.scales
    cases: list[tuple[str, tuple[object, ...]]] = [
        ("takes up to 16 rows, got 17", (x[:1].expand(17, 128), qweight, scales, None, 40)),
        ("contiguous in its last dimension", (x.T.contiguous().T, qweight, scales, None, 40)),
        ("x and scales must have the same dtype", (x.bfloat16(), qweight, scales, None, 40)),
        ("positive multiple of 32, got 100", (x[:, :100], qweight, scales, None, 40)),
        ("qweight must be int8", (x, qweight.int(), scales, None, 40)),
        ("qweight must have shape", (x, qweight, scales, None, 100)),
        (r"scales must have shape \(N,\)", (x, qweight, scales[:39], None, 40)),
        ("bias must have shape", (x, qweight, scales, bias[:3], 40)),
        ("scales must be on cuda:0", (x, qweight, scales.cpu(), None, 40)),
    ]
    for message, args in cases:
        with pytest.raises(RuntimeError, match=message):
            w8a16_linear(*args)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="qweight must have shape"):
        w8a16_dequantize(qweight, scales, 100)


def test_of_no_rows() -> None:
    weight, _, _ = make(20, 64, torch.float16)
    assert weight.linear(torch.empty(0, 64, dtype=torch.float16, device=DEVICE)).shape == (0, 20)
