"""The int8 layer and its quantizer on the CPU."""

from __future__ import annotations

import pytest
import torch

from hf_fastpath.modules import W8A16Linear
from hf_fastpath.packing_int8 import unpack_int8
from hf_fastpath.quantize import quantize_int8_rows


def make(n: int = 40, k: int = 96, dtype: torch.dtype = torch.bfloat16, bias: bool = True) -> W8A16Linear:
    torch.manual_seed(0)
    q, scales = quantize_int8_rows(torch.randn(n, k).to(dtype))
    return W8A16Linear.from_quantized(q, scales, torch.randn(n).to(dtype) if bias else None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(96,), (1, 96), (2, 5, 96), (0, 96)])
def test_against_float64(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    layer = make(dtype=dtype)
    x = torch.randn(shape).to(dtype)
    got = layer(x)
    assert (got.dtype, got.shape) == (dtype, (*shape[:-1], 40))
    assert layer.bias is not None
    q = unpack_int8(layer.canonical_qweight(), 40)
    weight, bias = q.double() * layer.scales.double()[:, None], layer.bias.double()
    expected = x.double() @ weight.T + bias
    # Rounded once after the product and once more with the bias; fp32 sums of 96 products lose less than that in fp16.
    size = x.double().abs() @ weight.abs().T + bias.abs()
    bound = max(2 * torch.finfo(dtype).eps, 96 * 2**-24) * size
    assert bool(((got.double() - expected).abs() <= bound).all())


def test_codes_and_scales() -> None:
    weight = torch.tensor([[1.0, -2.54, 0.01], [0.0, 0.0, 0.0], [1e-3, 5e-4, -1e-3]])
    q, scales = quantize_int8_rows(weight)
    assert q.tolist()[1] == [0, 0, 0]
    assert scales[1] == 0
    assert q[0, 1] == -127
    # Half a step, and the scale's own rounding to bf16 at 127 steps.
    error = (q.float() * scales.float()[:, None] - weight).abs()
    assert bool((error <= scales.float()[:, None] * (0.5 + 127 * 2**-8)).all())


def test_many_rows_are_quantized_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_fastpath import quantize

    weight = torch.randn(50, 32)
    whole = quantize_int8_rows(weight)
    monkeypatch.setitem(quantize._CHUNK_ELEMENTS, "cuda", 7 * 32)
    for ours, theirs in zip(quantize_int8_rows(weight), whole, strict=True):
        assert torch.equal(ours, theirs)


def test_not_finite_is_refused() -> None:
    weight = torch.randn(4, 32)
    weight[2, 3] = float("inf")
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_int8_rows(weight)


def test_files_hold_the_documented_layout() -> None:
    layer = make()
    canonical = layer.qweight.clone()
    layer(torch.randn(1, 96).bfloat16())
    assert layer.qweight.numel() == 0
    assert layer.nbytes == 40 * 96 + 2 * 40 + 2 * 40
    assert torch.equal(layer.state_dict()["qweight"], canonical)
    other = make()
    other.qweight = torch.zeros_like(other.qweight)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.qweight, canonical)
    assert torch.equal(layer.to("cpu").qweight, canonical)


def test_gradients_reach_the_input() -> None:
    layer = make(dtype=torch.float32, bias=False)
    x = torch.randn(3, 96, requires_grad=True)
    layer(x).sum().backward()
    expected = torch.ones(3, 40) @ layer.dequantized_weight().float()
    torch.testing.assert_close(x.grad, expected)
