"""The ops inside CUDA graphs, on other streams and on other devices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fused_cases import make_int8_weight
from gpu_common import DEVICE, GPU, make_weight, randn
from kernel_cases import generator

from hf_fastpath.ops import (
    attn_decode_int8,
    kv_int8_append,
    kv_int8_dequantize,
    w4a16_dequantize,
    w4a16_gemm,
    w4a16_linear,
    w4a16_linear_fused,
    w4a16_swiglu,
    w8a16_dequantize,
    w8a16_linear,
)

pytestmark = pytest.mark.gpu


class Step:
    """One of each op, as in a decode step: the inputs are buffers that can be refilled."""

    def __init__(self, device: str = DEVICE) -> None:
        rng = generator(1)
        dtype = torch.bfloat16
        weight = make_weight(rng, 256, 512, 128, dtype)
        self.qweight, self.scales = weight.qweight.to(device), weight.scales.to(device)
        head = make_int8_weight(GPU, rng, 100, 512, dtype)
        self.head, self.head_scales = head.qweight.to(device), head.scales.to(device)
        self.norm_weight = randn(rng, 512, dtype=dtype).to(device)
        self.x = randn(rng, 2, 512, dtype=dtype).to(device)
        shape = (2, 2, 608)
        self.k_data, self.v_data = (torch.zeros(*shape, 64, dtype=torch.int8, device=device) for _ in range(2))
        self.k_scale, self.v_scale = (torch.zeros(shape, dtype=torch.float16, device=device) for _ in range(2))
        self.cache = (self.k_data, self.k_scale, self.v_data, self.v_scale)
        self.tickets = torch.zeros(4, dtype=torch.int32, device=device)
        prompt = randn(rng, 2, 2, 599, 64, dtype=dtype).to(device)
        self.lengths = torch.zeros(2, 2, dtype=torch.int32, device=device)
        self.append(prompt, prompt, 0)

    def append(self, key: torch.Tensor, value: torch.Tensor, start: int) -> None:
        self.lengths.fill_(start)
        kv_int8_append(key, value, (self.k_data, self.k_scale, self.v_data, self.v_scale, self.lengths))

    def attend(self, query: torch.Tensor) -> torch.Tensor:
        return attn_decode_int8(query, (*self.cache, self.lengths), None, 0.125, tickets=self.tickets)

    def run(self) -> list[torch.Tensor]:
        y = w4a16_linear(self.x, self.qweight, self.scales, None, None, 256, 128)
        new = y.view(2, 2, 2, 64)  # (B, K or V, H, D)
        self.append(new[:, 0].unsqueeze(2), new[:, 1].unsqueeze(2), 599)
        out = self.attend(y.view(2, 4, 64))
        keys = kv_int8_dequantize(self.k_data, self.k_scale, slice(0, 600), torch.bfloat16)
        packed = (self.qweight, self.scales, None, None, self.norm_weight, 1e-5)
        fused = w4a16_linear_fused(self.x, *packed, y, 256, 128)
        activated = w4a16_swiglu(self.x, *packed, 128, 128)
        logits = w8a16_linear(self.x, self.head, self.head_scales, None, 100)
        many = w4a16_gemm(self.x.repeat(20, 1), self.qweight, self.scales, None, None, 256, 128, 0)
        weights = w4a16_dequantize(self.qweight, self.scales, None, 512, 256, 128)
        return [
            y,
            out,
            keys,
            many,
            fused,
            activated,
            logits,
            weights,
            w8a16_dequantize(self.head, self.head_scales, 100),
        ]


def test_a_captured_graph_replays_with_new_inputs() -> None:
    step = Step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step.run()
    for seed in range(3):
        step.x.copy_(randn(generator(seed), 2, 512, dtype=torch.bfloat16))
        for result in captured:
            result.fill_(float("nan"))
        graph.replay()
        replayed = [result.clone() for result in captured]
        assert all(torch.equal(a, b) for a, b in zip(replayed, step.run(), strict=True))


def test_ops_run_on_the_current_stream() -> None:
    """On another stream the ops see what was queued there before them, although the default stream is behind."""
    step = Step()
    expected = [result.clone() for result in step.run()]
    x = step.x.clone()
    step.x.fill_(float("nan"))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        step.x.copy_(x)
        results = step.run()
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_ops_run_on_a_device_that_is_not_current() -> None:
    expected = Step().run()
    assert torch.cuda.current_device() == 0
    results = Step("cuda:1").run()
    assert torch.cuda.current_device() == 0
    assert all(r.device == torch.device("cuda:1") for r in results)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(results, expected, strict=True))
    weight = make_weight(generator(2), 32, 128, 128, torch.float16)
    with pytest.raises(RuntimeError, match="qweight must be on cuda:1"):
        weight.linear(torch.ones(1, 128, dtype=torch.float16, device="cuda:1"))


def test_opcheck() -> None:
    """Schema, fake and aliasing agree with what the CUDA implementations do."""
    step = Step()
    ops = torch.ops.hf_fastpath
    checks: list[tuple[Callable[..., object], tuple[object, ...]]] = [
        (ops.w4a16_linear.default, (step.x, step.qweight, step.scales, None, None, 256, 128)),
        (
            ops.w4a16_linear_fused.default,
            (step.x, step.qweight, step.scales, None, None, step.norm_weight, 1e-5, None, 256, 128),
        ),
        (
            ops.w4a16_swiglu.default,
            (step.x, step.qweight, step.scales, None, None, step.norm_weight, 1e-5, 128, 128),
        ),
        (ops.w8a16_linear.default, (step.x, step.head, step.head_scales, None, 100)),
        (ops.w8a16_dequantize.default, (step.head, step.head_scales, 100)),
        (ops.w4a16_dequantize.default, (step.qweight, step.scales, None, 512, 256, 128)),
        (
            ops.attn_decode_int8.default,
            (step.x.view(2, 8, 64), *step.cache, step.lengths, step.tickets, None, 0.125, 0, 0.0, None),
        ),
    ]
    for op, args in checks:
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))  # type: ignore[arg-type]
