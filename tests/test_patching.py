"""patch_model, unpatch_model, fastpath_report: what they change, what they restore, what they refuse."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from typing import Any

import pytest
import torch
from tiny_models import fingerprint, logits, make_llama
from torch import nn
from transformers import LlamaForCausalLM

from hf_fastpath import FastpathConfig, Int8KVCache, Unsupported, fastpath_report, patch_model, steps, unpatch_model
from hf_fastpath.modules import W4A16Linear

QUIET = {"progress": False}


def make_eager(dtype: torch.dtype) -> LlamaForCausalLM:
    return make_llama(dtype, attn_implementation="eager")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patching_replaces_the_recipe_and_stays_close(dtype: torch.dtype, prompt: torch.Tensor) -> None:
    model = make_llama(dtype, initializer_range=0.05)
    before = logits(model, prompt).float()
    assert patch_model(model, **QUIET) is model
    packed = {name for name, module in model.named_modules() if isinstance(module, W4A16Linear)}
    assert len(packed) == 2 * 7
    assert isinstance(model.lm_head, nn.Linear)
    after = logits(model, prompt).float()
    relative = float((after - before).norm() / before.norm())
    assert 1e-3 < relative < 0.3  # int4 of random weights: a tenth an error of each layer, and not nothing


def test_unpatching_restores_modules_and_bits(prompt: torch.Tensor) -> None:
    model = make_llama()
    before, state = logits(model, prompt), fingerprint(model)
    patch_model(model, keep_original=True, **QUIET)
    assert not torch.equal(logits(model, prompt), before)
    assert unpatch_model(model) is model
    assert fingerprint(model) == state
    assert torch.equal(logits(model, prompt), before)
    patch_model(model, **QUIET)  # and it can be patched again


def test_unpatching_without_originals_says_so_and_can_dequantize(prompt: torch.Tensor) -> None:
    model = patch_model(make_llama(attention_bias=True), **QUIET)
    patched, state = logits(model, prompt), fingerprint(model)
    with pytest.raises(Unsupported, match=r"14 linear layers .*were not kept.*keep_original=True"):
        unpatch_model(model)
    assert fingerprint(model) == state
    unpatch_model(model, dequantize=True)
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    assert model.model.layers[0].self_attn.q_proj.bias is not None
    # The CPU's int4 product rounds activations to bf16 in every layer; the plain float32 layer does not.
    torch.testing.assert_close(logits(model, prompt), patched, rtol=0.05, atol=0.05 * float(patched.abs().max()))


def test_weights_none_leaves_every_module(prompt: torch.Tensor) -> None:
    model = make_llama()
    before, state = logits(model, prompt), fingerprint(model)
    patch_model(model, weights=None, kv_cache="static")
    assert fingerprint(model)["modules"] == state["modules"]
    assert torch.equal(logits(model, prompt), before)
    unpatch_model(model)
    assert fingerprint(model) == state


def test_kv_cache_none_leaves_attention_alone(prompt: torch.Tensor) -> None:
    model = patch_model(make_llama(), kv_cache=None, **QUIET)
    assert model.config._attn_implementation == "sdpa"
    assert type(model(prompt).past_key_values).__name__ == "DynamicCache"
    unpatch_model(model, dequantize=True)


def test_groups_fall_to_what_divides() -> None:
    model = patch_model(make_llama(hidden_size=192, intermediate_size=256), **QUIET)
    layer = model.model.layers[0]
    assert layer.mlp.gate_proj.group_size == 64
    assert layer.mlp.down_proj.group_size == 128
    assert layer.self_attn.o_proj.group_size == 64
    model = patch_model(make_llama(), group_size=32, zero_points=False, **QUIET)
    assert model.model.layers[0].mlp.gate_proj.group_size == 32
    assert model.model.layers[0].mlp.gate_proj.zeros is None


def test_originals_are_freed_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama(num_hidden_layers=3)
    originals = [weakref.ref(m.weight) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    alive = []
    quantize = steps.quantize_int4

    def counting(weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        alive.append(sum(ref() is not None for ref in originals))
        return quantize(weight, *args, **kwargs)

    monkeypatch.setattr(steps, "quantize_int4", counting)
    patch_model(model, scale_search="activation", **QUIET)
    assert alive == list(range(21, 0, -1))
    assert not any(ref() is not None for ref in originals)


def test_a_skipped_name_covers_what_is_below_it() -> None:
    model = patch_model(make_llama(), skip_modules=["model.layers.1"], **QUIET)
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert kinds["model.layers.1.mlp.up_proj"] is nn.Linear
    assert kinds["model.layers.0.mlp.up_proj"] is W4A16Linear


def test_skip_modules_and_report() -> None:
    model = patch_model(make_llama(), skip_modules=("lm_head", "down_proj", "model.layers.1.mlp.up_proj"), **QUIET)
    report = fastpath_report(model)
    rows = {row.name: row for row in report.rows}
    assert rows["model.layers.0.mlp.down_proj"].action == "left"
    assert rows["model.layers.0.mlp.down_proj"].reason == "in skip_modules"
    assert rows["model.layers.1.mlp.up_proj"].action == "left"
    assert rows["model.layers.0.mlp.up_proj"].action == "int4 g64 + zeros"
    assert {row.name for row in report.rows} == {
        name
        for name, module in model.named_modules()
        if list(module.parameters(recurse=False)) or list(module.buffers(recurse=False))
    }
    packed = model.model.layers[0].mlp.up_proj
    assert rows["model.layers.0.mlp.up_proj"].bytes_after == packed.nbytes
    assert rows["model.layers.0.mlp.up_proj"].bytes_before == 96 * 64 * 4
    text = str(report)
    for part in ("model.layers.*.mlp.gate_proj", "in skip_modules", "total", "int8 by default", "freed"):
        assert part in text


@pytest.mark.parametrize("tied", [False, True])
def test_report_counts_tied_tensors_once(tied: bool) -> None:
    model = make_llama(tie_word_embeddings=tied)
    total = sum(tensor.nbytes for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())
    patch_model(model, **QUIET)
    report = fastpath_report(model)
    assert report.bytes_before == total
    assert report.bytes_after < total
    assert ("tied" in {row.name: row for row in report.rows}["lm_head"].reason) == tied


def test_a_deep_copy_is_a_patched_model_of_its_own(prompt: torch.Tensor) -> None:
    model = patch_model(make_llama(), keep_original=True, **QUIET)
    expected = model.generate(prompt, max_new_tokens=5, do_sample=False)
    twin = copy.deepcopy(model)
    unpatch_model(model)
    assert torch.equal(twin.generate(prompt, max_new_tokens=5, do_sample=False), expected)
    unpatch_model(twin)
    assert torch.equal(logits(twin, prompt), logits(model, prompt))


def test_plain_forward_fills_our_cache_except_when_asked_otherwise(prompt: torch.Tensor) -> None:
    model = patch_model(make_llama(), **QUIET)
    with torch.no_grad():
        assert isinstance(model(prompt).past_key_values, Int8KVCache)
        assert isinstance(model(input_ids=prompt, use_cache=True).past_key_values, Int8KVCache)
        assert model(prompt, use_cache=False).past_key_values is None
        cache = Int8KVCache(model.config)
        assert model(prompt, past_key_values=cache).past_key_values is cache
        assert model(prompt, None, None, cache).past_key_values is cache
    assert not isinstance(model(prompt).past_key_values, Int8KVCache)  # gradients wanted: a cache holds no graph
    model.train()
    with torch.no_grad():
        assert not isinstance(model(prompt).past_key_values, Int8KVCache)


def test_gradients_flow_in_lossless_mode(prompt: torch.Tensor) -> None:
    stock, model = make_llama(), patch_model(make_llama(), weights=None, kv_cache="static")
    for each in (stock, model):
        each(prompt, labels=prompt).loss.backward()
    for (name, expected), (_, got) in zip(stock.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(got.grad, expected.grad), name


def test_configs_as_object_dict_and_overrides() -> None:
    base = FastpathConfig(group_size=32, scale_search="mse", progress=False)  # type: ignore[arg-type]
    model = patch_model(make_llama(), base, kv_cache=None)
    assert model._fastpath.config == dataclasses.replace(base, kv_cache=None)
    model = patch_model(make_llama(), {"weights": None, "kv_cache": "int8"})
    assert model._fastpath.config.weights is None


def test_activation_energy_finds_driven_channels_and_leaves_no_trace() -> None:
    from hf_fastpath.activations import input_energy

    model = make_llama().train()
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[5] = 30.0
    state = fingerprint(model)
    energy = input_energy(model, "model.layers", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"])
    assert fingerprint(model) == state
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert energy["model.layers.1.mlp.down_proj"].shape == (96,)
    driven = energy["model.layers.0.self_attn.q_proj"]
    assert int(driven.argmax()) == 5
    assert float(driven[5]) > 100 * float(driven.median())


def test_activation_search_costs_less_than_absmax(prompt: torch.Tensor) -> None:
    """The model's own outputs, over several random models: fewer errors than plain rounding at the same bits."""
    errors = {"absmax": 0.0, "activation": 0.0}
    ids = torch.randint(2, 199, (4, 32), generator=torch.Generator().manual_seed(3))
    for seed in range(4):
        for search in errors:
            model = make_llama(seed=seed, initializer_range=0.05)
            with torch.no_grad():  # some channels strongly driven, as in trained models
                for layer in model.model.layers:
                    layer.input_layernorm.weight[::16] = 8.0
                    layer.post_attention_layernorm.weight[::16] = 8.0
            before = logits(model, ids)
            after = logits(patch_model(model, scale_search=search, zero_points=False, **QUIET), ids)
            errors[search] += float((after - before).square().mean() / before.square().mean())
    assert errors["activation"] < 0.9 * errors["absmax"]


@pytest.mark.parametrize("kept", [True, False])
def test_an_interrupted_patch_leaves_no_half_patched_model(
    kept: bool, prompt: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_llama()
    before, state = logits(model, prompt), fingerprint(model)
    quantize, calls = steps.quantize_int4, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return quantize(*args, **kwargs)

    monkeypatch.setattr(steps, "quantize_int4", interrupted)
    with pytest.raises(KeyboardInterrupt) as error:
        patch_model(model, keep_original=kept, scale_search="activation", **QUIET)
    assert not any(isinstance(module, W4A16Linear) for module in model.modules())
    notes = getattr(error.value, "__notes__", [])
    if kept:
        assert fingerprint(model) == state
        assert torch.equal(logits(model, prompt), before)
        assert not notes
    else:
        assert fingerprint(model)["attributes"] == state["attributes"]
        assert "3 linear layers now hold the values of their int4 weights" in notes[0]
    monkeypatch.undo()
    patch_model(model, **QUIET)


def test_unpatching_follows_what_was_changed_meanwhile(prompt: torch.Tensor) -> None:
    model = patch_model(make_llama(torch.bfloat16), keep_original=True, **QUIET)
    model.float()
    model.train()
    model.set_attn_implementation("eager")
    unpatch_model(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(module.training for module in model.modules())
    assert model.config._attn_implementation == "eager"
    assert torch.equal(logits(model.eval(), prompt), logits(make_eager(torch.bfloat16).float(), prompt))


def test_static_mode_leaves_the_attention_implementation_alone(prompt: torch.Tensor) -> None:
    stock = make_llama(torch.bfloat16, attn_implementation="eager")
    model = patch_model(make_llama(torch.bfloat16, attn_implementation="eager"), weights=None, kv_cache="static")
    assert model.config._attn_implementation == "eager"
    flags = {"max_new_tokens": 8, "do_sample": False, "output_attentions": True, "return_dict_in_generate": True}
    expected, got = stock.generate(prompt, **flags), model.generate(prompt, **flags)
    assert torch.equal(got.sequences, expected.sequences)
    assert len(got.attentions[1]) == 2
    for a, b in zip(got.attentions[-1], expected.attentions[-1], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("overrides", [{}, {"weights": None, "kv_cache": "static"}], ids=["default", "lossless"])
def test_a_pickled_model_is_a_patched_model(overrides: dict[str, Any], tmp_path: Any, prompt: torch.Tensor) -> None:
    model = patch_model(make_llama(), **QUIET, **overrides)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    expected = model.generate(prompt, max_new_tokens=5, do_sample=False)
    out = again.generate(prompt, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(out.sequences, expected)
    assert again._prepare_cache_for_generation.args[0] is again
    assert type(out.past_key_values).__name__ == ("Int8KVCache" if not overrides else "StaticKVCache")


def test_patching_works_under_a_default_device(prompt: torch.Tensor) -> None:
    model = make_llama()
    with torch.device("meta"):
        patch_model(model, **QUIET)
    assert logits(model, prompt).isfinite().all()


def test_activation_energy_leaves_the_first_position_and_the_modes_alone() -> None:
    from hf_fastpath.activations import input_energy

    model = make_llama()
    model.model.layers[0].train()
    name = "model.layers.0.self_attn.q_proj"
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    energy = input_energy(model, "model.layers", [name])[name]
    handle.remove()
    torch.testing.assert_close(energy, seen[0][:, 1:].square().mean((0, 1)))
    assert model.model.layers[0].mlp.training
    assert not model.model.layers[1].training
