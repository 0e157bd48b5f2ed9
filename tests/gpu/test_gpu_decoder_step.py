"""Decoder layers in few operations, on the GPU: against transformers' own layers, rows in any batch, capture."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu_common import graph_nodes
from tiny_models import FAMILIES, logits, long_batch

from hf_fastpath import patch_model, unpatch_model
from hf_fastpath.generation import CACHES
from hf_fastpath.modules.decoder_step import DecoderStep

pytestmark = pytest.mark.gpu

SIZES = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 384,
}
QUICK = {"progress": False, "scale_search": "absmax"}
Calls = list[tuple[Any, ...]]


@pytest.fixture
def steps(count_calls: Callable[[Any, str], Calls]) -> Calls:
    return count_calls(DecoderStep, "__call__")


def patched(
    family: str = "llama",
    kv_cache: str = "int8",
    dtype: torch.dtype = torch.bfloat16,
    weights: str | None = "w4a16",
    **sizes: Any,
) -> Any:
    model = FAMILIES[family](dtype, **(SIZES | sizes)).to("cuda")
    options = {"kv_budget": 64} if kv_cache == "h2o" else {}
    return patch_model(model, weights=weights, kv_cache=kv_cache, **options, **QUICK)


def without_steps(model: Any) -> Any:
    for layer in model.model.layers:
        layer.__class__ = type(layer).__mro__[2]
    return model


def step_logits(model: Any, ids: torch.Tensor, prompt: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of each token behind the prompt, ``(B, n, V)``."""
    state = getattr(model, "_fastpath", None)
    cache = CACHES[state.config.kv_cache](model.config, **state.config.cache_options) if state else None

    def call(start: int, stop: int, cache: Any) -> Any:
        positions = None
        if mask is not None:
            positions = (mask[:, :stop].long().cumsum(1) - 1).clamp(0)[:, start:]
        seen = None if mask is None else mask[:, :stop]
        return model(ids[:, start:stop], attention_mask=seen, position_ids=positions, past_key_values=cache)

    with torch.no_grad():
        out = call(0, prompt, cache)
        logits = []
        for i in range(prompt, ids.shape[1]):
            out = call(i, i + 1, out.past_key_values)
            logits.append(out.logits)
    return torch.cat(logits, 1).double()


@pytest.mark.parametrize("padding", [(0,), (0, 7, 30)], ids=["one row", "padded"])
@pytest.mark.parametrize("kv_cache", ["int8", "fp8", "int4", "h2o", "static"])
@pytest.mark.parametrize("family", ["llama", "mistral, window", "qwen2", "qwen3"])
def test_it_is_no_less_exact_than_the_layers(
    family: str, kv_cache: str, padding: tuple[int, ...], steps: Calls
) -> None:
    """Against the int4 weights' values in float32, with a cache that rounds nothing: fewer roundings, no more error.
    The mean over 6,000 logits a row varies by the roundings that fall the other way."""
    if "window" in family and kv_cache == "h2o":
        pytest.skip("h2o takes no windows")
    inputs = long_batch(padding, 100)
    ids, mask = inputs["input_ids"].to("cuda"), inputs["attention_mask"].to("cuda")
    model = patched(family, kv_cache)
    fused = step_logits(model, ids, 70, mask)
    assert len(steps) == 60
    truth = step_logits(unpatch_model(copy.deepcopy(model), dequantize=True).float(), ids, 70, mask)
    plain = step_logits(without_steps(model), ids, 70, mask)
    assert len(steps) == 60
    error, plain_error = float((fused - truth).norm()), float((plain - truth).norm())
    assert 0 < error < 1.15 * plain_error
    assert float((fused - plain).norm()) < 1.5 * plain_error


@pytest.mark.parametrize("rows", [17, 33, 64, 130])
@pytest.mark.parametrize("kv_cache", ["int8", "static"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_many_rows_are_as_exact_as_the_layers(family: str, kv_cache: str, rows: int, steps: Calls) -> None:
    """Each rounding is the layers' own: errors differ by the sums that were added in another order."""
    inputs = long_batch(tuple(i % 30 for i in range(rows)), 60)
    ids, mask = inputs["input_ids"].to("cuda"), inputs["attention_mask"].to("cuda")
    model = patched(family, kv_cache)
    fused = step_logits(model, ids, 50, mask)
    assert len(steps) == 20
    truth = step_logits(unpatch_model(copy.deepcopy(model), dequantize=True).float(), ids, 50, mask)
    plain = step_logits(without_steps(model), ids, 50, mask)
    assert len(steps) == 20
    error, plain_error = float((fused - truth).norm()), float((plain - truth).norm())
    assert 0 < error < 1.1 * plain_error
    assert float((fused - plain).norm()) < 1.5 * plain_error


@pytest.mark.parametrize("weights", ["w4a16", "w16a16"])
@pytest.mark.parametrize("cuts", [(100,), (60, 100), (6, 9, 100)], ids=str)
@pytest.mark.parametrize("padding", [(0,), (0, 7, 30)], ids=len)
@pytest.mark.parametrize("kv_cache", ["int8", "fp8", "int4", "static"])
@pytest.mark.parametrize("family", ["llama", "mistral, window", "qwen2", "qwen3"])
def test_prompts_are_as_exact_as_the_layers(
    family: str,
    kv_cache: str,
    padding: tuple[int, ...],
    cuts: tuple[int, ...],
    weights: str,
    count_calls: Callable[[Any, str], Calls],
) -> None:
    """A prompt at once and in chunks. Each rounding is the layers' own or is left out."""
    inputs = long_batch(padding, 100)
    ids, mask = inputs["input_ids"].to("cuda"), inputs["attention_mask"].to("cuda")
    real = mask.bool()

    def prompt_logits(model: Any, cache: Any) -> torch.Tensor:
        parts, start, out = [], 0, None
        with torch.no_grad():
            for stop in cuts:
                places = (mask[:, :stop].cumsum(1) - 1).clamp(0)[:, start:]
                past = cache if out is None else out.past_key_values
                seen = mask[:, :stop]
                out = model(ids[:, start:stop], attention_mask=seen, position_ids=places, past_key_values=past)
                parts.append(out.logits)
                start = stop
        return torch.cat(parts, 1)[real].double()

    prompts, model = count_calls(DecoderStep, "prompt"), patched(family, kv_cache, weights=weights)
    new_cache = CACHES[model._fastpath.config.kv_cache]
    got = prompt_logits(model, new_cache(model.config))
    assert len(prompts) == 2 * len(cuts)
    truth = prompt_logits(unpatch_model(copy.deepcopy(model), dequantize=True).float(), None)
    plain = prompt_logits(without_steps(model), new_cache(model.config))
    assert len(prompts) == 2 * len(cuts)
    error, plain_error = float((got - truth).norm()), float((plain - truth).norm())
    assert 0 < error < 1.15 * plain_error


@pytest.mark.parametrize("padding", [(0,), (0, 7, 30), tuple(range(17)), tuple(range(64))], ids=len)
@pytest.mark.parametrize("kv_cache", ["static", "int8", "fp8", "int4", "h2o"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_weights_as_they_are(family: str, kv_cache: str, padding: tuple[int, ...], steps: Calls) -> None:
    """``weights="w16a16"`` against the weights in float32 with a cache that rounds nothing: no more error than
    transformers' layers have on the same cache. Over 6,000 logits a row it varies by the roundings that fall the other
    way, and a cache's rounding is the larger part of both."""
    inputs = long_batch(padding, 100)
    ids, mask = inputs["input_ids"].to("cuda"), inputs["attention_mask"].to("cuda")
    stock = FAMILIES[family](torch.bfloat16, **SIZES).to("cuda")
    truth = step_logits(copy.deepcopy(stock).float(), ids, 70, mask)
    plain = step_logits(patched(family, kv_cache, weights=None), ids, 70, mask)
    assert not steps
    got = step_logits(patched(family, kv_cache, weights="w16a16"), ids, 70, mask)
    assert len(steps) == 60
    error, plain_error = float((got - truth).norm()), float((plain - truth).norm())
    assert 0 < error < 1.15 * plain_error


def test_unpatching_weights_as_they_are() -> None:
    """Their logits have their bits again, and their memory is theirs."""
    ids = long_batch((0, 0), 40)["input_ids"].to("cuda")
    model = FAMILIES["qwen2"](torch.bfloat16, **SIZES).to("cuda")
    before, held = logits(model, ids), torch.cuda.memory_allocated()
    patch_model(model, weights="w16a16", kv_cache="static", progress=False)
    assert torch.cuda.memory_allocated() <= held + 2**16
    step_logits(model, ids, 30)
    unpatch_model(model)
    assert torch.equal(logits(model, ids), before)
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.weight.untyped_storage().nbytes() == attention.q_proj.weight.nbytes


@pytest.mark.parametrize(
    ("weights", "rows", "most"), [("w4a16", 1, 5), ("w16a16", 1, 5), ("w4a16", 64, 9), ("w16a16", 64, 12)]
)
def test_nodes_of_a_layer_in_a_graph(weights: str, rows: int, most: int) -> None:
    """Of up to 16 rows five; of more: norm, product, append and attention, product, sum and norm, product, SwiGLU,
    product, sum. cuBLAS adds the last sum itself, but may divide each of four products in two kernels."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("on other GPUs products of many rows are two kernels")
    model = patched("llama", "static", weights=weights, hidden_size=2048, head_dim=128, intermediate_size=4096)
    layer = model.model.layers[0]
    layer.prepare()
    step = layer.__dict__["_watched"].step
    x = torch.randn(rows, 2048, device="cuda").bfloat16()
    cos, sin = torch.randn(2, 1, 1, 128, device="cuda").bfloat16()
    cache = CACHES[model._fastpath.config.kv_cache](model.config).layers[0]
    with torch.no_grad():
        step(x, cos, sin, cache, None)
        assert graph_nodes(lambda: step(x, cos, sin, cache, None)) <= most


@pytest.mark.parametrize("weights", ["w4a16", "w16a16"])
@pytest.mark.parametrize("kv_cache", ["int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_rows_values_do_not_depend_on_the_batch(family: str, kv_cache: str, weights: str, steps: Calls) -> None:
    """Bit for bit from two rows on, for the layers' output: the last norm and the head are torch's, whose sums' order
    goes by the batch. The prompt is one token, so that no other product is in it."""
    ids = torch.randint(2, 199, (16, 24), generator=torch.Generator().manual_seed(9)).to("cuda")
    model = patched(family, kv_cache, weights=weights, hidden_size=2304, intermediate_size=4224)
    model.model.norm, model.lm_head = torch.nn.Identity(), torch.nn.Identity()
    full = step_logits(model, ids, 1)
    assert steps
    for rows in (slice(3, 5), slice(2, 6), slice(1, 6), slice(0, 8), slice(4, 13)):
        assert torch.equal(step_logits(model, ids[rows], 1), full[rows])
    for row in (0, 5):  # one row has kernels of its own, which add in another order
        alone = step_logits(model, ids[row : row + 1], 1)
        assert torch.equal(step_logits(model, ids[row : row + 1], 1), alone)
        torch.testing.assert_close(alone, full[row : row + 1], rtol=0.05, atol=0.02 * full.abs().max().item())


def test_merging_takes_no_memory() -> None:
    model = patched("qwen2")
    tensors = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in model.buffers()}
    assert sum(tensors.values()) == sum(x.nbytes for x in model.buffers())
    attention = model.model.layers[0].self_attn
    assert (
        attention.k_proj.qweight.untyped_storage().data_ptr() == attention.q_proj.qweight.untyped_storage().data_ptr()
    )


@pytest.mark.parametrize("kv_cache", ["int8", "fp8", "int4", "h2o", "static"])
def test_a_step_can_be_captured(kv_cache: str) -> None:
    """Nothing in it waits for the GPU, and a replay goes on where the cache ends."""
    model = patched("qwen3", kv_cache)
    layer = model.model.layers[0]
    layer.prepare()
    step = layer.__dict__["_watched"].step
    rng = torch.Generator().manual_seed(2)
    xs = torch.randn(70, 3, 256, generator=rng).bfloat16().to("cuda")
    angles = torch.rand(70, 1, 1, 32, generator=rng).repeat(1, 1, 1, 2)
    cos, sin = angles.cos().bfloat16().to("cuda"), angles.sin().bfloat16().to("cuda")
    options = model._fastpath.config.cache_options
    twins = [CACHES[model._fastpath.config.kv_cache](model.config, **options).layers[0] for _ in range(2)]
    with torch.no_grad():
        want = [step(x, c, s, twins[0], None) for x, c, s in zip(xs, cos, sin, strict=True)]
        x, c, s = xs[0].clone(), cos[0].clone(), sin[0].clone()
        got = [step(x, c, s, twins[1], None).clone()]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step(x, c, s, twins[1], None)
        for i in range(1, 70):
            x.copy_(xs[i]), c.copy_(cos[i]), s.copy_(sin[i])
            graph.replay()
            got.append(out.clone())
    assert torch.equal(torch.stack(got), torch.stack(want))
