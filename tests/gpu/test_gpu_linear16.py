"""The products of plain 16-bit weights, and a model's last norm and head on them, on the GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import linear16_cases
import pytest
import torch
from fused_cases import EPS, exact_norm
from gpu_common import DEVICE, GPU, graph_nodes, poison
from kernel_cases import DTYPES, SMALLEST, assert_within, generator, shifted
from linear16_cases import Inputs, check_linear, check_swiglu
from tiny_models import FAMILIES, long_batch
from torch import nn

from hf_fastpath import patch_model
from hf_fastpath.modules import DecodeHead, decode_head
from hf_fastpath.modules.logits_target import logits_go_to
from hf_fastpath.ops import linear_16bit, linear_16bit_into, linear_16bit_swiglu, rms_norm

pytestmark = pytest.mark.gpu

# Tails of N, K of every place where x is kept, norms within the product and apart, and K of sixteen chains.
SHAPES = [
    (1, 32),
    (17, 96),
    (100, 576),
    (129, 2048),
    (4100, 1056),
    (9000, 256),
    (17_000, 160),
    (257, 4096),
    (96, 4128),
    (64, 14336),
]
SWIGLU_SHAPES = [(32, 96), (96, 576), (224, 1152), (9024, 256), (512, 4096), (64, 4128)]


def make(n: int, k: int, dtype: torch.dtype, *, norm: bool = False, residual: bool = False) -> Inputs:
    rng = generator(n, k, norm, residual, DTYPES.index(dtype))
    return linear16_cases.make_inputs(GPU, rng, n, k, dtype, norm=norm, residual=residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("norm", "residual"), [(True, False), (False, True), (True, True), (False, False)])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_linear(n: int, k: int, norm: bool, residual: bool, dtype: torch.dtype) -> None:
    inputs = make(n, k, dtype, norm=norm, residual=residual)
    full = inputs.linear()
    check_linear(inputs, full)
    for m in range(1, 17):
        poison(m, n, dtype=dtype)
        assert torch.equal(inputs.rows(slice(0, m)).linear(), full[:m])
    assert torch.equal(inputs.rows(slice(11, 12)).linear(), full[11:12])
    poison(16, n, dtype=torch.float32)
    assert torch.equal(inputs.linear(float32_out=True), full.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize(("n", "k"), SWIGLU_SHAPES)
def test_swiglu(n: int, k: int, norm: bool, dtype: torch.dtype) -> None:
    inputs = make(n, k, dtype, norm=norm)
    full = inputs.swiglu()
    check_swiglu(inputs, full)
    for m in range(1, 17):
        poison(m, n // 2, dtype=dtype)
        assert torch.equal(inputs.rows(slice(0, m)).swiglu(), full[:m])
    assert torch.equal(inputs.rows(slice(11, 12)).swiglu(), full[11:12])


@pytest.mark.parametrize("m", [1, 5, 16])
def test_sanitize_small(m: int) -> None:
    """Every kernel once, small enough for compute-sanitizer."""
    for k in (96, 4128):
        inputs = make(33, k, torch.bfloat16, norm=True, residual=True).rows(slice(0, m))
        check_linear(inputs, inputs.linear())
        check_linear(replace(inputs, norm_weight=None), replace(inputs, norm_weight=None).linear())
        gated = make(64, k, torch.bfloat16, norm=True).rows(slice(0, m))
        check_swiglu(gated, gated.swiglu())
    wide = make(17_000, 96, torch.float16).rows(slice(0, m))  # many blocks for a CTA, x in registers from 5 rows on
    check_linear(wide, wide.linear())


def test_the_head_of_a_large_vocabulary() -> None:
    inputs = make(128_256, 2048, torch.bfloat16)
    full = inputs.linear()
    for m in (1, 4, 5, 8, 16):
        first = inputs.rows(slice(0, m)).linear()
        assert torch.equal(first, full[:m])
        check_linear(inputs.rows(slice(0, m)), first)
        for _ in range(5):
            assert torch.equal(inputs.rows(slice(0, m)).linear(), first)


def test_what_is_not_finite_stays_in_its_row() -> None:
    for k in (96, 4096, 4128):
        inputs = make(40, k, torch.float16)
        expected = inputs.linear()
        inputs.x[3, 5], inputs.x[9, 90] = float("nan"), float("inf")
        out = inputs.linear()
        others = [row for row in range(16) if row not in (3, 9)]
        assert torch.equal(out[others], expected[others])
        assert out[3].isnan().all()
        assert torch.equal(out[9], inputs.weight[:, 90] * float("inf"))


def test_views() -> None:
    inputs = make(40, 128, torch.bfloat16, norm=True, residual=True)
    expected = inputs.linear()
    assert torch.equal(replace(inputs, x=shifted(inputs.x, offset=8, extra=8)).linear(), expected)
    assert inputs.bias is not None
    assert inputs.residual is not None
    part = replace(
        inputs, weight=inputs.weight[13:30], bias=inputs.bias[13:30], residual=inputs.residual[:, 13:30].contiguous()
    )
    assert torch.equal(part.linear(), expected[:, 13:30])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [8, 2056, 4096, 8320])
def test_rms_norm(k: int, dtype: torch.dtype) -> None:
    inputs = make(1, k, dtype, norm=True)
    assert inputs.norm_weight is not None
    poison(16, k, dtype=dtype)
    out = rms_norm(inputs.x, inputs.norm_weight, EPS)
    exact, slack = exact_norm(inputs.x, inputs.norm_weight)
    assert_within(out, exact, slack + SMALLEST)
    assert torch.equal(rms_norm(shifted(inputs.x, offset=8, extra=8), inputs.norm_weight, EPS), out)


@pytest.mark.parametrize("m", [1, 2, 4, 16])
def test_a_chain_in_a_graph(m: int) -> None:
    """Kernels that begin before the one before them ends, each on its results; replays write over what was read."""
    k, rng = 1024, generator(m)
    layers = [linear16_cases.make_inputs(GPU, rng, k, k, torch.bfloat16, norm=True, rows=m) for _ in range(4)]
    gates = [linear16_cases.make_inputs(GPU, rng, 2 * k, k, torch.bfloat16, norm=True, rows=m) for _ in range(4)]

    def run(x: torch.Tensor) -> torch.Tensor:
        for layer, gate in zip(layers, gates, strict=True):
            inner = linear_16bit_swiglu(x, gate.weight, gate.bias, gate.norm_weight, EPS)
            x = linear_16bit(inner, layer.weight, layer.bias, None, 0.0, x)
            assert layer.norm_weight is not None
            x = linear_16bit(rms_norm(x, layer.norm_weight, EPS), layer.weight, None, None, 0.0, x)
        return x

    def step_by_step(x: torch.Tensor) -> torch.Tensor:
        for layer, gate in zip(layers, gates, strict=True):
            inner = replace(gate, x=x).swiglu()
            torch.cuda.synchronize()
            x = replace(layer, x=inner, norm_weight=None, residual=x).linear()
            torch.cuda.synchronize()
            assert layer.norm_weight is not None
            normalized = rms_norm(x, layer.norm_weight, EPS)
            torch.cuda.synchronize()
            x = replace(layer, x=normalized, bias=None, norm_weight=None, residual=x).linear()
            torch.cuda.synchronize()
        return x

    static = layers[0].x.clone()
    run(static)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = run(static)
    for _ in range(20):
        x = torch.randn(m, k, device=DEVICE).bfloat16()
        expected = step_by_step(x)
        static.copy_(x)
        graph.replay()
        assert torch.equal(out, expected)
        assert torch.equal(run(x), expected)


def test_bad_arguments_are_refused_in_words() -> None:
    inputs = make(40, 128, torch.float16, norm=True, residual=True)
    x, w, bias, norm, residual = inputs.x, inputs.weight, inputs.bias, inputs.norm_weight, inputs.residual
    assert bias is not None
    assert norm is not None
    assert residual is not None
    odd = torch.cat((w.flatten(), bias))[1 : 1 + w.numel()].view(w.shape)
    cases: list[tuple[str, tuple[object, ...]]] = [
        ("takes up to 16 rows, got 17", (x[:1].expand(17, 128), w, None, None, EPS, None, False)),
        ("positive multiple of 32, got 104", (x[:, :104], w, None, None, EPS, None, False)),
        ("contiguous in its last dimension", (x.T.contiguous().T, w, None, None, EPS, None, False)),
        ("x must be aligned to 16 bytes", (shifted(x, offset=1), w, None, None, EPS, None, False)),
        ("row stride of x must be a multiple of 8, got 131", (shifted(x, offset=8), w, None, None, EPS, None, False)),
        ("x must be float16 or bfloat16", (x.float(), w.float(), None, None, EPS, None, False)),
        ("weight and x must have the same dtype", (x.bfloat16(), w, None, None, EPS, None, False)),
        (r"weight must have shape \(N, K\)", (x, w[:, :96], None, None, EPS, None, False)),
        ("weight must be contiguous", (x, w.T.contiguous().T, None, None, EPS, None, False)),
        ("weight must be aligned", (x, odd, None, None, EPS, None, False)),
        ("bias must have shape", (x, w, bias[:3], None, EPS, None, False)),
        ("weight must be on cuda:0", (x, w.cpu(), None, None, EPS, None, False)),
        ("norm_weight and x must have the same dtype", (x, w, None, norm.float(), EPS, None, False)),
        (r"norm_weight must have shape \(K,\)", (x, w, None, norm[:64], EPS, None, False)),
        ("eps must not be negative", (x, w, None, norm, -1.0, None, False)),
        (r"residual must have shape \(M, N\)", (x, w, None, None, EPS, residual[:3], False)),
        ("residual must be contiguous", (x, w, None, None, EPS, residual.T.contiguous().T, False)),
    ]
    for message, args in cases:
        with pytest.raises(RuntimeError, match=message):
            linear_16bit(*args)  # type: ignore[arg-type]
    for message, out in (
        ("out and x must have the same dtype", residual.float()),
        (r"out must have shape \(M, N\)", residual[:3]),
        ("out must be contiguous", residual.T.contiguous().T),
    ):
        with pytest.raises(RuntimeError, match=message):
            linear_16bit_into(x, w, None, out)
    with pytest.raises(RuntimeError, match="each a multiple of 16, got 40 in all"):
        linear_16bit_swiglu(x, w, None, None, EPS)
    with pytest.raises(RuntimeError, match="a positive multiple of 8, got 12"):
        rms_norm(x[:, :12], norm[:12], EPS)


def test_of_no_rows() -> None:
    inputs = make(32, 64, torch.float16, norm=True).rows(slice(0, 0))
    assert inputs.linear().shape == (0, 32)
    assert inputs.swiglu().shape == (0, 16)
    assert inputs.norm_weight is not None
    assert rms_norm(inputs.x, inputs.norm_weight, EPS).shape == (0, 64)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 16, 17, 64])
def test_a_head_writes_where_it_is_told(rows: int, bias: bool) -> None:
    """The bits that it returns otherwise, in as many kernels, and nothing behind them."""
    torch.manual_seed(rows)
    head = nn.Linear(512, 3001, bias=bias, device=DEVICE, dtype=torch.bfloat16)
    head.__class__ = DecodeHead
    x = torch.randn(rows, 1, 512, device=DEVICE).bfloat16()
    buffer = torch.full((rows + 2, 3001), torch.nan, device=DEVICE, dtype=torch.bfloat16)

    def into() -> torch.Tensor:
        with logits_go_to(buffer[:rows]):
            return head(x)

    with torch.inference_mode():
        expected, out = head(x), into()
        assert out.data_ptr() == buffer.data_ptr()
        assert out.shape == expected.shape
        assert torch.equal(out, expected)
        assert buffer[rows:].isnan().all()
        assert graph_nodes(into) == graph_nodes(lambda: head(x))


@pytest.mark.parametrize("rows", [1, 2, 16, 17])
def test_a_head_is_its_linear_layer(rows: int) -> None:
    """Within what the order of sums allows; for more rows it is that layer."""
    torch.manual_seed(rows)
    head = nn.Linear(512, 3001, device=DEVICE, dtype=torch.bfloat16)
    x = torch.randn(rows, 1, 512, device=DEVICE).bfloat16()
    inputs = Inputs(GPU, x[:, 0], head.weight.detach(), head.bias.detach())
    with torch.no_grad():
        plain = head(x)
        head.__class__ = DecodeHead
        out = head(x)
        if rows > 16:
            assert torch.equal(out, plain)
            return
        check_linear(inputs, out[:, 0])
        odd = torch.randn(rows, 1, 513, device=DEVICE).bfloat16()[..., 1:]
        assert torch.equal(head(odd), head(odd.contiguous()))


@pytest.mark.parametrize("family", ["llama", "qwen3", "lfm2", "lfm2_moe", "gpt2"])
def test_generate_ends_in_our_ops(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens of the same patched model whose last norm and head are transformers'."""
    calls: list[tuple[object, ...]] = []

    def counted(*args: Any) -> torch.Tensor:
        calls.append(args)
        return linear_16bit(*args)

    monkeypatch.setattr(decode_head, "linear_16bit", counted)
    model = FAMILIES[family](torch.bfloat16).to(DEVICE)
    patch_model(model, progress=False, scale_search="absmax", cuda_graphs=False)
    inputs = {name: value.to(DEVICE) for name, value in long_batch((0, 5)).items()}
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    out = model.generate(**inputs, **options)
    assert calls
    head = model.get_output_embeddings()
    assert isinstance(head, DecodeHead)
    head.__class__ = nn.Linear
    plain = model.generate(**inputs, **options)
    # Until the first token that differs, logits differ by their own rounding, 2^-8, and what the norm's may carry over.
    for step, (got, want) in enumerate(zip(out.logits, plain.logits, strict=True)):
        assert float((got - want).abs().max()) <= 2.0**-6 * float(want.abs().max())
        if not torch.equal(out.sequences[:, -8 + step], plain.sequences[:, -8 + step]):
            break
