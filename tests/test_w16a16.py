"""Weights as they are, decoder layers as steps: ``weights="w16a16"``."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, fingerprint, logits, long_batch, make_llama
from torch import nn
from transformers import AutoModelForCausalLM

from hf_fastpath import (
    FastpathConfig,
    Unsupported,
    checks,
    fastpath_report,
    heuristics,
    patch_model,
    register,
    unpatch_model,
)
from hf_fastpath.generation import CACHES
from hf_fastpath.modules import merged
from hf_fastpath.modules.conv_step import ConvStep
from hf_fastpath.modules.decoder_step import DecoderStep, LayerStep
from hf_fastpath.modules.merged import PlainWeight, merge, why_not_merged

FUSED = ("llama", "mistral", "qwen2", "qwen3", "lfm2", "lfm2_moe")
GREEDY = {"do_sample": False, "max_new_tokens": 8}
IDS = long_batch((0,), 20)["input_ids"]
Calls = list[tuple[Any, ...]]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, count_calls: Callable[[Any, str], Calls]) -> Calls:
    """The CPU goes the ways that a GPU goes, on the references; the ends of layers' steps, prompts' too."""
    monkeypatch.setattr(heuristics, "fuses_decoder_step", lambda device: True)
    return count_calls(LayerStep, "add")


@pytest.fixture
def fused(steps: Calls, monkeypatch: pytest.MonkeyPatch, count_calls: Callable[[Any, str], Calls]) -> Calls:
    """Up to 16 rows go through the products that take in norms, residuals and SwiGLU; their calls."""
    monkeypatch.setattr(heuristics, "linear_16bit_supports", lambda kind, dtype, rows, *args: rows <= 16)
    return count_calls(merged, "linear_16bit")


def patched(family: str = "llama", kv_cache: str = "static", dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
    return patch_model(FAMILIES[family](dtype, **sizes), weights="w16a16", kv_cache=kv_cache)


def generated(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    out = model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("padding", [(0,), (0, 5, 60), tuple(range(20))], ids=["one row", "padded", "many rows"])
@pytest.mark.parametrize("family", FUSED)
def test_it_computes_what_stock_computes(family: str, padding: tuple[int, ...], steps: Calls) -> None:
    """In float32 only the order of sums differs."""
    stock, inputs = FAMILIES[family](), long_batch(padding)
    want_tokens, want = generated(stock, inputs)
    tokens, got = generated(patched(family), inputs)
    layers = len(stock.model.layers) - (2 if family == "lfm2_moe" else 0)
    assert len(steps) >= layers * 8
    assert torch.equal(tokens, want_tokens)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("family", FUSED)
def test_few_rows_in_fused_products(family: str, fused: Calls, steps: Calls) -> None:
    stock, inputs = FAMILIES[family](), long_batch((0, 5, 60))
    want_tokens, want = generated(stock, inputs)
    tokens, got = generated(patched(family), inputs)
    # Of a layer with a feed-forward three products, SwiGLU apart; the prompt is more rows.
    dense = 1 if family == "lfm2_moe" else len(stock.model.layers)
    assert len(fused) == 7 * (2 * len(stock.model.layers) + dense)
    assert len(steps) <= len(stock.model.layers)
    assert torch.equal(tokens, want_tokens)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("kv_cache", ["int8", "fp8", "int4", "h2o"])
def test_every_cache(kv_cache: str, steps: Calls) -> None:
    inputs = long_batch((0, 5))
    want_tokens, want = generated(patch_model(make_llama(), weights=None, kv_cache=kv_cache), inputs)
    assert not steps  # weights=None leaves the layers to transformers
    tokens, got = generated(patched(kv_cache=kv_cache), inputs)
    assert len(steps) == 16
    assert torch.equal(tokens, want_tokens)
    # A sum in another order can move a key by one of int8's 127 steps.
    torch.testing.assert_close(got, want, rtol=0, atol=4e-3 * float(want.abs().max()))


@pytest.mark.parametrize("family", ["qwen2", "lfm2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("in_one", [False, True], ids=["apart", "fused"])
def test_it_rounds_no_more_than_stock(
    family: str, dtype: torch.dtype, in_one: bool, steps: Calls, request: pytest.FixtureRequest
) -> None:
    """Against the same weights in float32; the means are over 8 x 6 x 199 logits, which vary by a few percent."""
    stock = FAMILIES[family](dtype)
    if in_one:
        request.getfixturevalue("fused")
    ids = torch.randint(2, 199, (8, 26), generator=torch.Generator().manual_seed(5))

    def last_logits(model: Any, cache: Any) -> torch.Tensor:
        with torch.no_grad():
            model(ids[:, :20], past_key_values=cache)
            return torch.stack([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(20, 26)]).double()

    def new_cache() -> Any:
        return next(iter(CACHES.values()))(stock.config)

    truth, plain = (last_logits(model, new_cache()) for model in (copy.deepcopy(stock).float(), stock))
    got = last_logits(patch_model(copy.deepcopy(stock), weights="w16a16", kv_cache="static"), new_cache())
    assert steps
    error, plain_error = float((got - truth).norm()), float((plain - truth).norm())
    assert 0 < error < 1.1 * plain_error


@pytest.mark.parametrize("family", ["qwen2", "lfm2", "lfm2_moe", "gpt2"])
def test_unpatching_restores_the_very_model(family: str, steps: Calls) -> None:
    model, inputs = FAMILIES[family](torch.bfloat16), long_batch((0, 4))
    before, expected = fingerprint(model), logits(model, IDS)
    places = {name: value.untyped_storage().nbytes() for name, value in model.named_parameters()}
    patch_model(model, weights="w16a16", kv_cache="static")
    generated(model, inputs)
    assert bool(steps) == (family != "gpt2")
    unpatch_model(model)
    assert fingerprint(model) == before
    assert torch.equal(logits(model, IDS), expected)
    assert {name: value.untyped_storage().nbytes() for name, value in model.named_parameters()} == places


def test_merging_takes_no_memory(steps: Calls) -> None:
    model = make_llama()

    def bytes_held() -> int:
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in model.parameters()}
        return sum(storages.values())

    before, state = bytes_held(), {name: x.clone() for name, x in model.state_dict().items()}
    patch_model(model, weights="w16a16", kv_cache="static")
    generated(model, long_batch((0,)))
    assert bytes_held() == before
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    attention = model.model.layers[0].self_attn
    starts = [layer.weight.data_ptr() for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    assert starts[1] - starts[0] == attention.q_proj.weight.nbytes
    assert starts[2] - starts[1] == attention.k_proj.weight.nbytes


def test_weights_that_change_or_move(steps: Calls) -> None:
    model, other, inputs = patched("qwen2"), patched("qwen2", seed=4), long_batch((0, 3))
    generated(model, inputs)
    want = generated(other, inputs)[1]
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(generated(model, inputs)[1], want)
    third = patched("qwen2", seed=7)
    generated(third, inputs)
    third.load_state_dict({name: x.clone() for name, x in other.state_dict().items()}, assign=True)
    torch.testing.assert_close(generated(third, inputs)[1], want)
    with torch.no_grad():  # what .to() does: the parameters stay the objects that they are
        for parameter in model.parameters():
            parameter.data = parameter.data.clone() * 2
    doubled = patch_model(FAMILIES["qwen2"](seed=4), weights="w16a16", kv_cache="static")
    with torch.no_grad():
        for parameter in doubled.parameters():
            parameter.mul_(2)
    torch.testing.assert_close(generated(model, inputs)[1], generated(doubled, inputs)[1])
    model.to(torch.bfloat16)
    steps.clear()
    generated(model, inputs)
    assert len(steps) == 16


def test_copies_and_files(steps: Calls, tmp_path: Path) -> None:
    model, inputs = patched("qwen2"), long_batch((0, 4))
    want = generated(model, inputs)[0]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        steps.clear()
        assert torch.equal(generated(twin, inputs)[0], want)
        assert len(steps) == 16
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    stock = FAMILIES["qwen2"]()
    assert all(torch.equal(x, stock.state_dict()[name]) for name, x in plain.state_dict().items())
    register()
    config = FastpathConfig(weights="w16a16", kv_cache="static", progress=False)  # type: ignore[arg-type]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    steps.clear()
    assert torch.equal(generated(loaded, inputs)[0], want)
    assert len(steps) == 16
    assert torch.equal(logits(unpatch_model(loaded), IDS), logits(stock, IDS))


def test_a_packed_head_beside_plain_layers(steps: Calls) -> None:
    model = patch_model(make_llama(), weights="w16a16", kv_cache="int8", lm_head="int8", progress=False)
    generated(model, long_batch((0,)))
    assert len(steps) == 16
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear


def test_a_layer_whose_groups_differ(steps: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products on int4 and on plain weights in one layer."""
    monkeypatch.setattr(heuristics, "w4a16_variant", lambda *args: heuristics.W4A16Variant.REFERENCE)
    options: dict[str, Any] = {"progress": False, "scale_search": "absmax", "kv_cache": "static"}
    model = patch_model(make_llama(), skip_modules=("down_proj", "o_proj"), **options)
    inputs = long_batch((0, 3))
    tokens, got = generated(model, inputs)
    assert len(steps) == 16
    for layer in model.model.layers:
        layer.__class__ = type(layer).__mro__[2]
    want_tokens, want = generated(model, inputs)
    assert torch.equal(tokens, want_tokens)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * float(want.abs().max()))


def test_without_a_gpu_it_is_stock(count_calls: Callable[[Any, str], Calls]) -> None:
    calls = [count_calls(kind, "__call__") for kind in (DecoderStep, ConvStep)]
    for family in ("llama", "lfm2", "gemma", "gpt2"):
        stock, inputs = FAMILIES[family](torch.bfloat16), long_batch((0, 4))
        want = generated(stock, inputs)
        got = generated(patch_model(stock, weights="w16a16", kv_cache="static"), inputs)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not any(calls)


def test_what_it_is_not_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="kv_cache=None, transformers' own"):
        FastpathConfig(weights="w16a16", kv_cache=None)  # type: ignore[arg-type]
    config = FastpathConfig(weights="w16a16", kv_cache="static")  # type: ignore[arg-type]
    monkeypatch.setattr(checks, "why_no_kernels", lambda device, dtype: f"no kernels for {dtype}")
    with pytest.raises(Unsupported, match=r"no kernels for torch\.float32; fallback='reference'"):
        checks.choose_reference(make_llama(), config, SimpleNamespace(type="cuda"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="calibration is for int4 weights"):
        patch_model(make_llama(), config, calibration=torch.zeros(1, 8, dtype=torch.long))


def test_the_report_says_what_runs() -> None:
    text = str(fastpath_report(patched("llama")))
    assert "weights='w16a16': linear layers as they are, 2 decoder layers that a GPU would run in kernels" in text
    assert "Forward passes of ours: 6 Embedding, Linear, LlamaDecoderLayer, LlamaRMSNorm" in text
    assert "weights='w16a16'" in [row.reason for row in fastpath_report(patched()).rows if row.kind == "Linear"]
    gpt2 = str(fastpath_report(patched("gpt2")))
    assert "0 decoder layers" in gpt2
    lossless = str(fastpath_report(patch_model(make_llama(), weights=None, kv_cache="static")))
    assert "Forward passes of transformers' own: 2 LlamaDecoderLayer, weights=None" in lossless
    wrapped = make_llama()
    wrapped.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    text = str(fastpath_report(patch_model(wrapped, weights="w16a16", kv_cache="static")))
    assert "1 LlamaDecoderLayer, layers of one input differ in bias, dtype or gradients" in text


def test_what_cannot_be_merged() -> None:
    assert why_not_merged([nn.Linear(16, 8), nn.Linear(16, 24)]) == ""
    assert "differ in bias" in why_not_merged([nn.Linear(16, 8), nn.Linear(16, 8, bias=False)])
    assert "multiple of 8" in why_not_merged([nn.Linear(12, 8)])
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(16, 8))
    assert "neither all int4 nor all plain" in why_not_merged([parametrized])


@pytest.mark.parametrize("bias", [False, True])
def test_a_product_added_to_a_total(bias: bool) -> None:
    layers = [nn.Linear(16, 8, bias=bias), nn.Linear(16, 24, bias=bias)]
    weight, x, total = merge(layers), torch.randn(5, 16), torch.randn(5, 32)
    assert isinstance(weight, PlainWeight)
    want = total + torch.cat([layer(x) for layer in layers], dim=1)
    torch.testing.assert_close(weight.product(x, None, total), want)
    torch.testing.assert_close(weight.add_to(total, x), want)
