"""LFM2's decoder layers in few kernels: against the same patched model without them, and what forbids them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, long_batch
from torch import nn

from hf_fastpath import fastpath_report, heuristics, patch_model, unpatch_model
from hf_fastpath.heuristics import W4A16Variant
from hf_fastpath.modules import W4A16Linear
from hf_fastpath.modules.conv_step import ConvStep
from hf_fastpath.modules.decoder_step import DecoderStep
from hf_fastpath.modules.moe_step import MoEStep
from hf_fastpath.patches.lfm2_layers import FusedLfm2Layer

QUICK = {"progress": False, "scale_search": "absmax"}
GREEDY = {"do_sample": False, "max_new_tokens": 12}
LFM2 = ("lfm2", "lfm2_moe")
Calls = tuple[list[Any], list[Any]]  # of convolution and of attention layers


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, count_calls: Callable[[Any, str], list[Any]]) -> Calls:
    """The CPU goes the ways that a GPU goes, on the references."""
    monkeypatch.setattr(heuristics, "w4a16_variant", lambda *args: W4A16Variant.REFERENCE)
    monkeypatch.setattr(heuristics, "fuses_decoder_step", lambda device: True)
    return count_calls(ConvStep, "__call__"), count_calls(DecoderStep, "__call__")


def without_steps(model: Any) -> Any:
    """The same model with transformers' own decoder layers."""
    for layer in model.model.layers:
        assert isinstance(layer, FusedLfm2Layer)
        layer.__class__ = type(layer).__mro__[3]
    return model


def patched(family: str = "lfm2", kv_cache: str = "int8", dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
    return patch_model(FAMILIES[family](dtype, **sizes), kv_cache=kv_cache, **QUICK)


def run(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and the logits of each step."""
    flags = {"return_dict_in_generate": True, "output_logits": True}
    out = model.generate(**inputs, **flags, **(GREEDY | options))
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("padding", [(0,), (0, 5, 60)], ids=["one row", "padded"])
@pytest.mark.parametrize("kv_cache", ["int8", "int4", "static"])
@pytest.mark.parametrize("family", LFM2)
def test_it_computes_what_the_layers_compute(
    family: str, kv_cache: str, padding: tuple[int, ...], biased: bool, steps: Calls
) -> None:
    """In float32 only the order of sums differs, in products whose rows are together now."""
    model, inputs = patched(family, kv_cache, conv_bias=biased), long_batch(padding)
    tokens, logits = run(model, inputs)
    assert [len(calls) for calls in steps] == [2 * 11, 11]  # the prompt gives the first of 12 tokens
    expected_tokens, expected = run(without_steps(model), inputs)
    assert [len(calls) for calls in steps] == [2 * 11, 11]
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("family", LFM2)
def test_more_rows_than_fused_products_take(family: str, steps: Calls) -> None:
    model, inputs = patched(family, conv_bias=True), long_batch(tuple(range(20)), 29)
    tokens, logits = run(model, inputs, max_new_tokens=4)
    assert [len(calls) for calls in steps] == [6, 3]
    expected_tokens, expected = run(without_steps(model), inputs, max_new_tokens=4)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("family", LFM2)
@pytest.mark.parametrize("chunk", [1, 7])
def test_padding_stays_out_of_the_state(family: str, chunk: int, steps: Calls) -> None:
    """Prompts in chunks of one token are steps too, some of which hold nothing but padding."""
    model, inputs = patched(family, conv_bias=True), long_batch((0, 5, 9), 20)
    together = run(model, inputs, prefill_chunk_size=chunk)[1]
    assert len(steps[0]) >= 2 * 11
    for row, padding in enumerate((0, 5, 9)):
        alone = run(model, {"input_ids": inputs["input_ids"][row : row + 1, padding:]})[1]
        # float32 sums in another order, which can move a key by one of int8's 127 steps.
        assert float((together[:, row] - alone[:, 0]).abs().max()) <= 4e-3 * float(alone.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_mixtures_of_experts_are_steps_where_they_are_ours(
    dtype: torch.dtype, steps: Calls, count_calls: Callable[[Any, str], list[Any]]
) -> None:
    mixtures, inputs = count_calls(MoEStep, "__call__"), long_batch((0, 4))
    model = patched("lfm2_moe", "int8", dtype)
    run(model, inputs)
    assert len(mixtures) == 2 * 12  # the last two of three layers, the prompt counted
    mixtures.clear()
    left = patch_model(FAMILIES["lfm2_moe"](dtype), kv_cache="int8", skip_modules=("experts",), **QUICK)
    steps[0].clear()
    run(left, inputs)
    assert steps[0]
    assert bool(mixtures) == (dtype is torch.bfloat16)  # experts in 16 bits have an op of their own
    mixtures.clear()
    model.model.layers[1].feed_forward.experts.register_forward_hook(lambda *args: None)
    run(model, inputs)
    assert len(mixtures) == 12  # of the other layer


def test_beams_sampling_and_assistants(steps: Calls) -> None:
    model, inputs = patched(), long_batch((0, 3))
    modes: list[dict[str, Any]] = [
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 20, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
    ]
    for mode in modes:
        rows = {name: x[:1] for name, x in inputs.items()} if "prompt_lookup_num_tokens" in mode else inputs
        twin = without_steps(copy.deepcopy(model))
        torch.manual_seed(3)
        tokens = model.generate(**rows, **(GREEDY | mode))
        torch.manual_seed(3)
        assert torch.equal(tokens, twin.generate(**rows, **(GREEDY | mode)))
    assert steps[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_it_rounds_less_than_the_layers_do(dtype: torch.dtype, steps: Calls) -> None:
    """Against the same weights in float32: leaving out roundings must not add error."""
    model, inputs = patched("lfm2", "static", dtype), long_batch((0,) * 8, 40)
    exact = copy.deepcopy(model).float()
    truth = run(exact, inputs, max_new_tokens=2)[1].double()
    fused, plain = (run(m, inputs, max_new_tokens=2)[1].double() for m in (model, without_steps(copy.deepcopy(model))))
    assert steps[0]
    assert not torch.equal(fused, plain)
    assert float((fused - truth)[1].norm()) < 1.1 * float((plain - truth)[1].norm())  # means over 1,600 logits


def test_what_a_hook_and_gradients_see(steps: Calls) -> None:
    model, seen = patched(), []
    handle = model.model.layers[0].conv.out_proj.register_forward_hook(lambda *args: seen.append(args[0]))
    run(model, long_batch((0,)))
    assert len(seen) == 12
    assert [len(calls) for calls in steps] == [11, 11]  # of the other layers
    handle.remove()
    cache = run_cache(model)
    for calls in steps:
        calls.clear()
    assert model(torch.tensor([[5]]), past_key_values=cache).logits.requires_grad
    model.generate(**long_batch((0,)), **GREEDY, cache_implementation="dynamic")
    assert not any(steps)


def run_cache(model: Any) -> Any:
    """A cache with a prompt in it."""
    return model.generate(**long_batch((0,)), **GREEDY, return_dict_in_generate=True).past_key_values


def test_new_weights_are_seen(steps: Calls) -> None:
    model, inputs = patched(conv_bias=True), long_batch((0, 4))
    before = run(model, inputs)[0]
    other = patch_model(FAMILIES["lfm2"](seed=4, conv_bias=True), kv_cache="int8", **QUICK)
    model.load_state_dict(other.state_dict())
    assert torch.equal(run(model, inputs)[0], run(other, inputs)[0])
    assert not torch.equal(run(model, inputs)[0], before)
    for calls in steps:
        calls.clear()
    model.to(torch.bfloat16)
    run(model, inputs)
    assert len(steps[0]) == 22


@pytest.mark.parametrize("family", LFM2)
def test_unpatching_leaves_nothing(family: str, steps: Calls) -> None:
    model, inputs = FAMILIES[family](), long_batch((0,))
    before = model.generate(**inputs, **GREEDY)
    kinds, attributes = ([f(layer) for layer in model.model.layers] for f in (type, lambda layer: sorted(vars(layer))))
    patch_model(model, keep_original=True, **QUICK)
    run(model, inputs)
    assert steps[0]
    unpatch_model(model)
    assert [type(layer) for layer in model.model.layers] == kinds
    assert [sorted(vars(layer)) for layer in model.model.layers] == attributes
    assert torch.equal(model.generate(**inputs, **GREEDY), before)


def test_the_report_says_which_layers_and_why() -> None:
    assert (
        "Forward passes of ours: 9 Embedding, Lfm2DecoderLayer, Lfm2RMSNorm, Lfm2RotaryEmbedding, Lfm2ShortConv, Linear"
        in str(fastpath_report(patched()))
    )
    skipped = patch_model(FAMILIES["lfm2"](), skip_modules=("model.layers.0.feed_forward.w1",), **QUICK)
    text = str(fastpath_report(skipped))
    assert "Forward passes of transformers' own: 1 Lfm2DecoderLayer, linear layers of one input are" in text
    odd = FAMILIES["lfm2"]()
    odd.model.layers[2].ffn_norm = nn.RMSNorm(64)
    text = str(fastpath_report(patch_model(odd, **QUICK)))
    assert "1 Lfm2DecoderLayer, its ffn_norm is a RMSNorm, no Lfm2RMSNorm" in text
    wide = patch_model(FAMILIES["lfm2"](conv_L_cache=9), **QUICK)
    assert "2 Lfm2DecoderLayer, its convolution has 9 taps" in str(fastpath_report(wide))
    assert isinstance(wide.model.layers[0].conv.in_proj, W4A16Linear)
