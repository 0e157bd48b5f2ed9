"""W4A16Linear: the right product in every dtype, and one weight in two layouts without loss."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hf_fastpath.heuristics import W4A16Variant, w4a16_variant
from hf_fastpath.modules import W4A16Linear
from hf_fastpath.quantize import quantize_int4


def make(n: int, k: int, group: int, zeros: bool, bias: bool, dtype: torch.dtype) -> W4A16Linear:
    torch.manual_seed(n * k)
    weight = (torch.randn(n, k) * 0.05).to(dtype)
    return W4A16Linear.from_quantized(
        quantize_int4(weight, group, zero_points=zeros), torch.randn(n).to(dtype) if bias else None
    )


CASES = [
    (20, 1056, 32, True, False),  # wider than one band of the identity that reads the codes back
    (576, 576, 64, True, False),
    (100, 96, 32, False, True),
    (17, 128, 128, True, True),
    (1, 32, 32, True, False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 1, 40)], ids=str)
def test_product(case: tuple[int, int, int, bool, bool], dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    layer = make(*case, dtype)
    weight = layer.dequantized_weight().double()
    x = torch.randn(*shape, layer.in_features).to(dtype)
    exact = nn.functional.linear(x.double(), weight, None if layer.bias is None else layer.bias.double())
    got = layer(x)
    assert got.shape == (*shape, layer.out_features)
    assert got.dtype == dtype
    # Activations, weights, scales, zeros and the result are each rounded to bf16 (relative 2^-9) at most once, and the
    # zero's rounding is of up to 8 steps where the weight is about 4: five roundings, the errors adding at random.
    error = (got.double() - exact).norm() / exact.norm()
    assert float(error) < 2.5 * 2**-8
    assert float((got.double() + 0.05 * exact.abs().mean() - exact).norm() / exact.norm()) > 2.5 * 2**-8


@pytest.mark.parametrize("case", CASES, ids=str)
def test_only_one_layout_is_held_and_nothing_is_lost(case: tuple[int, int, int, bool, bool]) -> None:
    layer = make(*case, torch.bfloat16)
    qweight, weight = layer.qweight.clone(), layer.dequantized_weight()
    size = layer.nbytes
    layer(torch.randn(1, layer.in_features).bfloat16())
    assert layer.qweight.numel() == 0
    # Torch's layout keeps scale and zero in two bf16 each; ours scale and a byte. Both count, so a little more.
    groups = layer.scales.numel()
    assert layer.nbytes <= size + 4 * groups
    assert torch.equal(layer.canonical_qweight(), qweight)
    assert torch.equal(layer.dequantized_weight(), weight)
    assert torch.equal(layer.state_dict()["qweight"], qweight)
    layer.to(torch.float16)  # any move or cast goes through the documented layout
    assert torch.equal(layer.qweight, qweight)


def test_state_dict_round_trip_and_copy() -> None:
    layer, other = make(*CASES[1], torch.bfloat16), make(*CASES[1], torch.bfloat16)
    other.scales.zero_()
    x = torch.randn(2, 576).bfloat16()
    expected = layer(x)
    assert not other(x).any()  # and now `other` holds the CPU layout, which loading must replace
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), expected)
    assert torch.equal(copy.deepcopy(layer)(x), expected)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    layer = make(*CASES[1], torch.bfloat16)
    x = torch.randn(16, 576).bfloat16()
    alone = torch.cat([layer(row[None]) for row in x])
    torch.testing.assert_close(layer(x), alone, rtol=2**-7, atol=1e-3)


def test_empty_batch_and_wrong_width() -> None:
    layer = make(*CASES[1], torch.bfloat16)
    assert layer(torch.empty(0, 576).bfloat16()).shape == (0, 576)
    with pytest.raises(RuntimeError, match="shape"):
        layer(torch.randn(1, 575).bfloat16())


def test_variants() -> None:
    assert w4a16_variant("cpu", 1) is w4a16_variant("cpu", 1000) is W4A16Variant.CPU_INT4PACK
    assert w4a16_variant("cuda", 1) is w4a16_variant("cuda", 16) is W4A16Variant.CUDA_KERNEL
    assert w4a16_variant("cuda", 17) is W4A16Variant.CUDA_GEMM


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_flow_to_the_input(dtype: torch.dtype) -> None:
    layer = make(100, 96, 32, True, True, dtype)
    plain = nn.Linear(96, 100, dtype=dtype)
    plain.load_state_dict({"weight": layer.dequantized_weight().to(dtype), "bias": layer.bias})
    layer(torch.randn(1, 96).to(dtype))  # the layout that decoding left behind must not matter
    x = torch.randn(3, 96, dtype=dtype, requires_grad=True)
    upstream = torch.randn(3, 100, dtype=dtype)
    (expected,) = torch.autograd.grad(plain(x), x, upstream)
    out = layer(x)
    (got,) = torch.autograd.grad(out, x, upstream)
    assert torch.equal(got, expected)
    with torch.no_grad():
        assert torch.equal(out, layer(x))  # wanting a gradient changes no number


def test_a_forward_that_could_need_a_gradient_expands_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make(*CASES[1], torch.bfloat16)
    monkeypatch.setattr(W4A16Linear, "dequantized_weight", lambda self: pytest.fail("expanded"))
    layer(torch.randn(3, 576, requires_grad=True).bfloat16())
