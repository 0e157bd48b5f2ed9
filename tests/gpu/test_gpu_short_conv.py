"""The short convolution's kernels on the GPU: against float64, against torch's operations, captured in a graph."""

from __future__ import annotations

from typing import Any

import kernel_cases
import pytest
import torch
from conv_cases import DTYPES, MASKS, FusedStep, ShortConvCase, check_out, new_state, to_device
from fused_cases import EPS, make_fused_inputs
from gpu_common import DEVICE, GPU, make_weight
from kernel_cases import generator

from hf_fastpath.ops import short_conv_prefill, short_conv_step, w4a16_short_conv

pytestmark = pytest.mark.gpu


def on_gpu(case: ShortConvCase) -> list[Any]:
    return [to_device(x, DEVICE) for x in case.inputs().values()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("tokens", [1, 2, 9, 70, 1000])
def test_masks_and_lengths(tokens: int, mask: str, dtype: torch.dtype) -> None:
    ShortConvCase(dtype, tokens=tokens, mask=mask).check(GPU)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("taps", range(2, 9))
@pytest.mark.parametrize("tokens", [1, 5, 17, 300])
def test_taps(taps: int, tokens: int, dtype: torch.dtype) -> None:
    for mask in ("none", "left"):
        ShortConvCase(dtype, tokens=tokens, taps=taps, mask=mask, biased=taps % 2 == 0).check(GPU)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("change", [
    {"channels": 37}, {"channels": 7, "batch": 1}, {"offset": 1}, {"offset": 8}, {"channels": 2048, "batch": 16},
    {"channels": 520, "batch": 2, "offset": 8, "biased": False}, {"channels": 4, "mask": "holes"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("tokens", [1, 11, 600])
def test_shapes_and_strides(change: dict[str, Any], tokens: int, dtype: torch.dtype) -> None:
    ShortConvCase(dtype, **({"tokens": tokens} | change)).check(GPU)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_division_into_chunks_gives_the_same_bits(dtype: torch.dtype) -> None:
    bcx, state, weight, bias, _ = on_gpu(ShortConvCase(dtype, batch=2, tokens=700, channels=64))
    whole_state = state.clone()
    whole = short_conv_prefill(bcx, whole_state, weight, bias, None)
    for sizes in ((1, 699), (300, 1, 399), (5, 1, 1, 33, 660)):
        part_state = state.clone()
        parts = [
            short_conv_step(part[:, 0], part_state, weight, bias, None).unsqueeze(1)
            if part.shape[1] == 1
            else short_conv_prefill(part, part_state, weight, bias, None)
            for part in bcx.split(sizes, dim=1)
        ]
        assert torch.equal(torch.cat(parts, dim=1), whole)
        assert torch.equal(part_state, whole_state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_are_those_of_torch(dtype: torch.dtype) -> None:
    """Its operations run where the kernels do not, and in stock models. In fp16 torch adds a bias to a rounded sum."""
    for tokens in (1, 9, 300):
        case = ShortConvCase(dtype, tokens=tokens, channels=96, mask="left", biased=dtype is not torch.float16)
        expected, args, again = case.inputs(), on_gpu(case), on_gpu(case)
        out = short_conv_prefill(*args, reference=True)
        check_out(out.cpu(), **expected)
        assert torch.equal(short_conv_prefill(*again).nan_to_num(), out.nan_to_num())
        assert torch.equal(args[1].cpu(), new_state(**expected))
        assert torch.equal(again[1], args[1])


def test_captured_steps_move_the_state_and_skip_padding() -> None:
    """A graph's replays, on new inputs at the same addresses, against the same calls one by one."""
    case = ShortConvCase(torch.bfloat16, batch=4, tokens=6, channels=256, mask="left")
    bcx, state, weight, bias, mask = on_gpu(case)
    expected_state, expected = state.clone(), []
    for token in range(case.tokens):
        expected.append(short_conv_step(bcx[:, token], expected_state, weight, bias, mask[:, token]))
    x, m, graph = bcx[:, 0].clone(), mask[:, 0].clone(), torch.cuda.CUDAGraph()
    before = state.clone()
    with torch.cuda.graph(graph):
        out = short_conv_step(x, state, weight, bias, m)
    assert torch.equal(state, before)  # nothing ran yet
    for token in range(case.tokens):
        x.copy_(bcx[:, token])
        m.copy_(mask[:, token])
        graph.replay()
        real = mask[:, token]
        assert torch.equal(out[real], expected[token][real])
    assert torch.equal(state, expected_state)


@pytest.mark.parametrize("dtype", kernel_cases.DTYPES, ids=str)
@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zeros"])
@pytest.mark.parametrize(("channels", "k", "group", "taps"), [
    (16, 96, 32, 3), (64, 576, 64, 4), (80, 1152, 128, 3), (48, 256, 32, 2), (32, 640, 128, 8), (16, 4224, 64, 3),
    (2048, 2048, 128, 3), (2048, 2048, 32, 3), (2560, 2560, 64, 3), (4096, 4096, 128, 5),
])  # fmt: skip
def test_fused_with_the_projection(
    channels: int, k: int, group: int, taps: int, zeros: bool, dtype: torch.dtype
) -> None:
    rng = generator(channels, k, taps)
    weight = make_weight(rng, 3 * channels, k, group, dtype, with_zeros=zeros)
    inputs = make_fused_inputs(GPU, rng, 16, weight, dtype, norm=True, residual=False)
    FusedStep.make(GPU, rng, taps, channels, dtype).check(inputs, weight)


def test_bad_arguments_of_the_fused_one() -> None:
    rng, dtype = generator(1), torch.float16
    weight = make_weight(rng, 96, 128, 32, dtype)
    inputs = make_fused_inputs(GPU, rng, 16, weight, dtype, norm=True, residual=False)
    step = FusedStep.make(GPU, rng, 3, 32, dtype)
    x, packed, conv = inputs.x, (weight.qweight, weight.scales, None, None), (step.state, step.weight, None, step.mask)
    norm = inputs.norm_weight, EPS
    for message, args in [
        ("multiple of 16 channels", (x, *packed, *norm, step.state, step.weight[:24], None, None, 32)),
        ("takes 2 to 8 taps, got 1", (x, *packed, *norm, step.state, step.weight[:, :1], None, None, 32)),
        ("takes up to 16 rows, got 17", (x[:1].expand(17, 128), *packed, *norm, *conv, 32)),
        (r"state must have shape \(M, H, L\)", (x[:5], *packed, *norm, *conv, 32)),
        ("conv_bias and x must have the same dtype", (x, *packed, *norm, step.state.float(), *conv[1:], 32)),
        ("must be contiguous", (x, *packed, *norm, step.state.mT.contiguous().mT, *conv[1:], 32)),
        ("mask must be bool", (x, *packed, *norm, *conv[:3], step.mask.int(), 32)),
        (r"norm_weight must have shape \(K,\)", (x, *packed, norm[0][:64], EPS, *conv, 32)),
    ]:
        with pytest.raises(RuntimeError, match=message):
            w4a16_short_conv(*args)


def test_an_empty_batch() -> None:
    bcx, state, weight, bias, _ = on_gpu(ShortConvCase(torch.float16))
    assert short_conv_prefill(bcx[:0], state[:0], weight, bias, None).shape == (0, 9, 40)
    assert short_conv_step(bcx[:0, 0], state[:0], weight, bias, None).shape == (0, 40)


def test_bad_arguments_are_refused_in_words() -> None:
    bcx, state, weight, bias, mask = on_gpu(ShortConvCase(torch.float16, mask="left"))
    for message, args in [
        ("takes 2 to 8 taps, got 9", (bcx, state, weight[:, :1].expand(-1, 9).contiguous(), bias, mask)),
        ("bcx must hold 3 H = 120 values a token", (bcx[..., :-1], state, weight, bias, mask)),
        ("bcx must be contiguous in its last", (bcx.mT.contiguous().mT, state, weight, bias, mask)),
        (r"state must have shape \(batch, H, L\)", (bcx, state[:2], weight, bias, mask)),
        ("state must be contiguous", (bcx, state.mT.contiguous().mT, weight, bias, mask)),
        ("weight and bcx must have the same dtype", (bcx, state, weight.float(), bias, mask)),
        (r"bias must have shape \(H,\)", (bcx, state, weight, bias[1:], mask)),
        ("mask must be bool", (bcx, state, weight, bias, mask.int())),
        (r"mask must have shape \(batch, T\)", (bcx, state, weight, bias, mask[:, 1:])),
        ("takes 1 to 2.30 tokens, got 0", (bcx[:, :0], state, weight, bias, None)),
        ("must be float16 or bfloat16", (bcx.double(), state, weight, bias, mask)),
    ]:
        with pytest.raises(RuntimeError, match=message):
            short_conv_prefill(*args)
    with pytest.raises(RuntimeError, match=r"mask must have shape \(batch,\)"):
        short_conv_step(bcx[:, 0], state, weight, bias, mask)
