"""LFM2's decoder layers in few kernels, on the GPU: against transformers' own layers, rows in any batch, capture."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, long_batch

from hf_fastpath import patch_model, unpatch_model
from hf_fastpath.generation import CACHES
from hf_fastpath.modules.conv_step import ConvStep
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
Calls = tuple[list[Any], list[Any]]  # of convolution and of attention layers


@pytest.fixture
def steps(count_calls: Callable[[Any, str], list[Any]]) -> Calls:
    return count_calls(ConvStep, "__call__"), count_calls(DecoderStep, "__call__")


def patched(
    family: str = "lfm2",
    kv_cache: str = "int8",
    dtype: torch.dtype = torch.bfloat16,
    weights: str | None = "w4a16",
    **sizes: Any,
) -> Any:
    model = FAMILIES[family](dtype, **(SIZES | sizes)).to("cuda")
    return patch_model(model, weights=weights, kv_cache=kv_cache, **QUICK)


def without_steps(model: Any) -> Any:
    for layer in model.model.layers:
        layer.__class__ = type(layer).__mro__[3]
    return model


def step_logits(model: Any, ids: torch.Tensor, prompt: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of each token behind the prompt, ``(B, n, V)``."""
    state = getattr(model, "_fastpath", None)
    out: Any = None
    cache = CACHES[state.config.kv_cache](model.config) if state else None
    logits = []
    with torch.no_grad():
        for start, stop in [(0, prompt), *((i, i + 1) for i in range(prompt, ids.shape[1]))]:
            positions = None if mask is None else (mask[:, :stop].cumsum(1) - 1).clamp(0)[:, start:]
            seen = None if mask is None else mask[:, :stop]
            past = cache if out is None else out.past_key_values
            out = model(ids[:, start:stop], attention_mask=seen, position_ids=positions, past_key_values=past)
            logits.append(out.logits)
    return torch.cat(logits[1:], 1).double()


@pytest.mark.parametrize("padding", [(0,), (0, 7, 30), tuple(range(17)), tuple(range(64))], ids=len)
@pytest.mark.parametrize("kv_cache", ["int8", "int4", "static"])
def test_it_is_no_less_exact_than_the_layers(kv_cache: str, padding: tuple[int, ...], steps: Calls) -> None:
    """Against the int4 weights' values in float32, with a cache that rounds nothing: fewer roundings, no more error.
    The mean over 6,000 logits a row varies by the roundings that fall the other way."""
    inputs = long_batch(padding, 100)
    ids, mask = inputs["input_ids"].to("cuda"), inputs["attention_mask"].to("cuda")
    model = patched("lfm2", kv_cache, conv_bias=True)
    fused = step_logits(model, ids, 70, mask)
    assert [len(calls) for calls in steps] == [60, 30]
    truth = step_logits(unpatch_model(copy.deepcopy(model), dequantize=True).float(), ids, 70, mask)
    plain = step_logits(without_steps(model), ids, 70, mask)
    assert [len(calls) for calls in steps] == [60, 30]
    error, plain_error = float((fused - truth).norm()), float((plain - truth).norm())
    assert 0 < error < 1.15 * plain_error
    assert float((fused - plain).norm()) < 1.5 * plain_error


@pytest.mark.parametrize("padding", [(0,), (0, 7, 30), tuple(range(33))], ids=len)
@pytest.mark.parametrize("kv_cache", ["int8", "static"])
def test_weights_as_they_are(kv_cache: str, padding: tuple[int, ...], steps: Calls) -> None:
    """As in test_gpu_decoder_step.py."""
    inputs = long_batch(padding, 100)
    ids, mask = inputs["input_ids"].to("cuda"), inputs["attention_mask"].to("cuda")
    truth = step_logits(FAMILIES["lfm2"](torch.bfloat16, **SIZES).to("cuda").float(), ids, 70, mask)
    plain = step_logits(patched("lfm2", kv_cache, weights=None), ids, 70, mask)
    assert not any(steps)
    got = step_logits(patched("lfm2", kv_cache, weights="w16a16"), ids, 70, mask)
    assert [len(calls) for calls in steps] == [60, 30]
    error, plain_error = float((got - truth).norm()), float((plain - truth).norm())
    assert 0 < error < 1.15 * plain_error


def test_experts_run_behind_it(steps: Calls) -> None:
    """A rounding can send a token to another expert: most logits are near those of the layers."""
    ids = long_batch((0, 0), 90)["input_ids"].to("cuda")
    model = patched("lfm2_moe", "static", num_experts=8)
    fused = step_logits(model, ids, 70)
    assert [len(calls) for calls in steps] == [40, 20]
    plain = step_logits(without_steps(model), ids, 70)
    near = (fused - plain).norm(dim=-1) < 0.1 * plain.norm(dim=-1)
    assert near.double().mean() > 0.7


def test_a_rows_logits_do_not_depend_on_the_batch(steps: Calls) -> None:
    """Bit for bit from two rows on, for steps; the prompt is one token, so that no other product is in it."""
    ids = torch.randint(2, 199, (16, 24), generator=torch.Generator().manual_seed(9)).to("cuda")
    model = patched(hidden_size=2304, intermediate_size=4224)
    model.model.embedding_norm, model.lm_head = torch.nn.Identity(), torch.nn.Identity()
    full = step_logits(model, ids, 1)
    assert all(steps)
    for rows in (slice(3, 5), slice(2, 6), slice(1, 6), slice(0, 8), slice(4, 13)):
        assert torch.equal(step_logits(model, ids[rows], 1), full[rows])
    for row in (0, 5):  # one row has kernels of its own, which add in another order
        alone = step_logits(model, ids[row : row + 1], 1)
        assert torch.equal(step_logits(model, ids[row : row + 1], 1), alone)
        torch.testing.assert_close(alone, full[row : row + 1], rtol=0.05, atol=0.02 * full.abs().max().item())


@pytest.mark.parametrize("masked", [False, True])
def test_a_step_can_be_captured(masked: bool) -> None:
    """Nothing in it waits for the GPU, and a replay goes on from the state where it is."""
    layer = patched().model.layers[0]
    layer.prepare()
    step, rng = layer.__dict__["_watched"].step, torch.Generator().manual_seed(2)
    xs = torch.randn(20, 3, 256, generator=rng).bfloat16().to("cuda")
    masks = (torch.rand(20, 3, generator=rng) < 0.7).to("cuda")
    states = [torch.zeros(3, *step.state_shape, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    with torch.no_grad():
        want = [step(x, states[0], m if masked else None) for x, m in zip(xs, masks, strict=True)]
        x, m, graph = xs[0].clone(), masks[0].clone(), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            out = step(x, states[1], m if masked else None)
        got = []
        for i in range(20):
            x.copy_(xs[i]), m.copy_(masks[i])
            graph.replay()
            got.append(out.clone())
    assert torch.equal(torch.stack(got), torch.stack(want))
    assert torch.equal(*states)


def test_decoding_waits_for_nothing() -> None:
    """The layers of a decode step in a padded batch, once the prompt has been read."""
    inputs = {name: x.to("cuda") for name, x in long_batch((0, 7)).items()}
    model = patched()
    with torch.no_grad():
        cache = CACHES[model._fastpath.config.kv_cache](model.config)
        model(**inputs, past_key_values=cache)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 8), value=1)
        tokens = inputs["input_ids"].shape[1]
        model(inputs["input_ids"][:, :1], attention_mask=mask[:, : tokens + 1], past_key_values=cache)
        hidden = torch.randn(2, 1, 256, dtype=torch.bfloat16, device="cuda")
        positions = torch.full((2, 1), tokens, device="cuda")
        angles = model.model.rotary_emb(hidden, position_ids=positions)
        seen = torch.ones(2, 1, 1, tokens + 2, dtype=torch.bool, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            for layer in model.model.layers:
                seen_here = seen if layer.is_attention_layer else None
                hidden = layer(hidden, attention_mask=seen_here, position_embeddings=angles, past_key_values=cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert hidden.isfinite().all()
