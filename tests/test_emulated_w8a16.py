"""The int8 product and dequantization: the CUDA kernels in the emulator, against float64 and the reference's bits."""

from __future__ import annotations

import pytest
import torch
from emulated import EmulatedOps
from emulator import needs_emulator
from fused_cases import Int8Weight, check_int8_linear, make_int8_weight
from kernel_cases import DTYPES, Target, generator, shifted

from hf_fastpath.packing_int8 import dequantize_int8, pack_int8

pytestmark = needs_emulator

SHAPES = [(1, 32), (17, 96), (100, 288), (64, 64), (40, 1056)]  # tails of N and K, fewer units of K than warps and more


def make(n: int, k: int, dtype: torch.dtype) -> tuple[Int8Weight, torch.Tensor, torch.Tensor]:
    rng = generator(n, k, DTYPES.index(dtype))
    weight = make_int8_weight(Target("cpu", EmulatedOps()), rng, n, k, dtype)
    return weight, torch.randn(16, k, generator=rng).to(dtype), torch.randn(n, generator=rng).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_linear_for_every_number_of_rows(n: int, k: int, with_bias: bool, dtype: torch.dtype) -> None:
    weight, x, bias = make(n, k, dtype)
    chosen = bias if with_bias else None
    full = weight.linear(x, chosen)
    check_int8_linear(x, weight, chosen, full)
    for m in (1, 2, 7, 8, 9, 15):
        assert torch.equal(weight.linear(x[:m], chosen), full[:m])
    assert torch.equal(weight.linear(x[11:12], chosen), full[11:12])


@pytest.mark.parametrize("m", [1, 3, 9])
def test_linear_reads_shifted_views(m: int) -> None:
    weight, x, _ = make(20, 288, torch.float16)
    expected = weight.linear(x[:m])
    for offset, extra in ((1, 3), (8, 8), (4, 8), (8, 1)):
        assert torch.equal(weight.linear(shifted(x[:m], offset=offset, extra=extra)), expected), (offset, extra)


def test_a_slice_of_row_tiles_is_a_slice_of_the_result() -> None:
    weight, x, _ = make(80, 96, torch.bfloat16)
    part = Int8Weight(weight.qweight[1:3], weight.scales[16:46], weight.exact[16:46], weight.target)
    assert torch.equal(part.linear(x[:4]), weight.linear(x[:4])[:, 16:46])
    assert torch.equal(part.dequantize(), weight.dequantize()[16:46])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_byte_is_converted_exactly(dtype: torch.dtype) -> None:
    """With scale 1 and one x of 1 the result is the byte itself."""
    q = (torch.arange(256)[:, None] + 5 * torch.arange(32)).to(torch.int8)
    plain = Int8Weight(pack_int8(q), torch.ones(256, dtype=dtype), q.double(), Target("cpu", EmulatedOps()))
    assert torch.equal(plain.dequantize().double(), q.double())
    for column in (0, 13, 31):
        x = torch.zeros(1, 32, dtype=dtype)
        x[0, column] = 1
        assert torch.equal(plain.linear(x)[0].double(), q[:, column].double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_dequantize_has_the_references_bits(n: int, k: int, dtype: torch.dtype) -> None:
    weight, _, _ = make(n, k, dtype)
    weight.scales[::3] *= 1e-4  # subnormal products in fp16
    weight.scales[::2].neg_()
    expected = dequantize_int8(weight.qweight, weight.scales, n)
    assert torch.equal(weight.dequantize().view(torch.int16), expected.view(torch.int16))
