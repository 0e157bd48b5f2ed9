"""Every supported model family: what is patched, generate() against stock, unpatching, saving, loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, fingerprint, logits, make_gpt2, make_llama
from torch import nn
from transformers import AutoModelForCausalLM, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from hf_fastpath import FastpathConfig, Unsupported, fastpath_report, patch_model, register, unpatch_model
from hf_fastpath.patches import RECIPES, find_recipe

QUIET = {"progress": False}
LOSSLESS = {"weights": None, "kv_cache": "static"}
PATCHES = {"lossless": LOSSLESS, "int8 kv": {"weights": None, "kv_cache": "int8"}, "default": QUIET}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 50},
    "beams": {"num_beams": 3, "do_sample": False},
    "several sequences": {"do_sample": True, "num_return_sequences": 2},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 4},
}
everywhere = pytest.mark.parametrize("family", FAMILIES)


def generate(model: Any, inputs: dict[str, torch.Tensor], **kwargs: Any) -> Any:
    torch.manual_seed(7)
    return model.generate(**inputs, max_new_tokens=12, **kwargs)


def test_every_recipe_is_tested() -> None:
    made = [type(make()) for make in FAMILIES.values()]
    for recipe in RECIPES:
        for kind in recipe.model_classes:
            assert kind in made
    assert len([kind for kind in made if not any(kind in recipe.model_classes for recipe in RECIPES)]) == 2


@everywhere
@pytest.mark.parametrize("mode", MODES)
def test_lossless_mode_is_identical_to_stock(family: str, mode: str, padded: Any) -> None:
    expected = generate(FAMILIES[family](), padded, **MODES[mode])
    got = generate(patch_model(FAMILIES[family](), **LOSSLESS), padded, **MODES[mode])
    assert torch.equal(got, expected)


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lossless_logits_have_the_same_bits(family: str, dtype: torch.dtype, padded: Any) -> None:
    flags = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    expected = generate(FAMILIES[family](dtype), padded, **flags)
    got = generate(patch_model(FAMILIES[family](dtype), **LOSSLESS), padded, **flags)
    assert torch.equal(got.sequences, expected.sequences)
    # transformers' cache drops what left a sliding window, ours has it masked: the same sums with more zeros in them.
    rounding = 8 * torch.finfo(dtype).eps if "window" in family else 0
    for a, b in zip(got.logits, expected.logits, strict=True):
        assert float((a - b).abs().max()) <= rounding * float(b.abs().max())


@everywhere
def test_everything_in_the_layers_is_packed_and_stays_close(family: str, prompt: torch.Tensor) -> None:
    model = FAMILIES[family](initializer_range=0.05)
    before, recipe = logits(model, prompt), find_recipe(model)
    patch_model(model, **QUIET)
    for name, module in model.get_submodule(recipe.decoder_layers).named_modules():
        weights = [weight for weight in module.parameters(recurse=False) if weight.dim() > 1]
        small = isinstance(module, nn.Conv1d) or type(module).__name__.endswith("Router")
        assert small or not weights, f"{name} is left"
    relative = float((logits(model, prompt) - before).norm() / before.norm())
    assert 1e-3 < relative < 0.3  # int4 of random weights: a tenth an error of each layer, and not nothing


@everywhere
def test_unpatching_restores_modules_and_bits(family: str, prompt: torch.Tensor) -> None:
    model = FAMILIES[family]()
    before, state = logits(model, prompt), fingerprint(model)
    patch_model(model, keep_original=True, **QUIET)
    assert not torch.equal(logits(model, prompt), before)
    unpatch_model(model)
    assert fingerprint(model) == state
    assert torch.equal(logits(model, prompt), before)


@everywhere
@pytest.mark.parametrize("patch", PATCHES)
def test_padded_rows_give_what_they_give_alone(family: str, patch: str, padded: Any) -> None:
    model = patch_model(FAMILIES[family](), **PATCHES[patch])
    flags = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    together = generate(model, padded, **flags)
    for row in range(3):
        length = int(padded["attention_mask"][row].sum())
        alone = generate(model, {"input_ids": padded["input_ids"][row : row + 1, -length:]}, **flags)
        assert torch.equal(together.sequences[row, 8:], alone.sequences[0, length:])
        for a, b in zip(together.logits, alone.logits, strict=True):
            # Sums in another order in float32. That can move a key to the next of int8's 127 steps, which is 1 / 254 of
            # that channel; and with int4 weights each activation is also rounded to bf16 again.
            tolerance = {"lossless": 1e-4, "int8 kv": 4e-3, "default": 0.03}[patch]
            assert float((a[row] - b[0]).abs().max()) <= tolerance * float(b.abs().max())


@everywhere
@pytest.mark.parametrize("helper", ["prompt lookup", "assistant"])
def test_assisted_decoding_gives_the_greedy_tokens(family: str, helper: str, prompt: torch.Tensor) -> None:
    model = patch_model(FAMILIES[family](), **LOSSLESS)
    inputs = {"input_ids": prompt[:1].repeat(1, 3)}
    expected = generate(model, inputs, do_sample=False)
    assistant = patch_model(FAMILIES[family](seed=5), **LOSSLESS)
    extra = {"prompt_lookup_num_tokens": 3} if helper == "prompt lookup" else {"assistant_model": assistant}
    assert torch.equal(generate(model, inputs, do_sample=False, **extra), expected)


@everywhere
@pytest.mark.parametrize("patch", PATCHES)
def test_continuing_with_a_returned_cache(family: str, patch: str, prompt: torch.Tensor) -> None:
    model = patch_model(FAMILIES[family](), **PATCHES[patch])
    whole = generate(model, {"input_ids": prompt}, do_sample=False)
    first = model.generate(prompt, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    rest = model.generate(first.sequences, max_new_tokens=7, do_sample=False, past_key_values=first.past_key_values)
    assert torch.equal(rest, whole)


@everywhere
@pytest.mark.parametrize("search", ["activation", "mse", "absmax"])
def test_quantizing_while_loading_and_reloading_give_the_same_bits(
    family: str, search: str, tmp_path: Path, prompt: torch.Tensor
) -> None:
    register()
    FAMILIES[family](torch.bfloat16).save_pretrained(tmp_path / "float")
    config = FastpathConfig(scale_search=search, progress=False)  # type: ignore[arg-type]
    patched = patch_model(AutoModelForCausalLM.from_pretrained(tmp_path / "float"), config)
    patched.save_pretrained(tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    for model in (loaded, reloaded):
        assert torch.equal(logits(model, prompt), logits(patched, prompt))
    assert str(fastpath_report(loaded)) == str(fastpath_report(patched))
    reloaded.save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "packed" / name).read_bytes()


def test_a_conv1d_is_packed_as_the_linear_layer_that_it_is(prompt: torch.Tensor) -> None:
    model, twin = make_gpt2(), make_gpt2()
    inside = twin.transformer.h[0].mlp
    linear = nn.Linear(64, 256)
    with torch.no_grad():
        linear.weight.copy_(inside.c_fc.weight.t())
        linear.bias.copy_(inside.c_fc.bias)
    inside.c_fc = linear
    for each in (model, twin):
        patch_model(each, scale_search="mse", kv_cache=None, **QUIET)
    assert torch.equal(logits(model, prompt), logits(twin, prompt))
    rows = {row.name: row for row in fastpath_report(model).rows}
    assert rows["transformer.h.0.mlp.c_fc"].kind == "Conv1D"
    unpatch_model(model, dequantize=True)
    assert type(model.transformer.h[0].mlp.c_fc) is Conv1D
    assert model.transformer.h[0].mlp.c_fc.weight.shape == (64, 256)


def test_gpt2_calibrates_within_its_positions(prompt: torch.Tensor) -> None:
    for search in ("output", "activation"):
        model = patch_model(make_gpt2(n_positions=32), scale_search=search, **QUIET)
        assert logits(model, prompt).isfinite().all()


def test_gpt2_with_cross_attention_names_what_is_left() -> None:
    model = patch_model(make_gpt2(add_cross_attention=True), kv_cache=None, **QUIET)
    rows = {row.name: row for row in fastpath_report(model).rows}
    assert rows["transformer.h.1.crossattention.q_attn"].reason == "not in the recipe"
    assert rows["transformer.h.1.attn.c_attn"].action.startswith("int4")


class Renamed(GPT2LMHeadModel):
    """A user's own subclass."""


def test_a_subclass_has_its_parents_recipe() -> None:
    assert find_recipe(Renamed(make_gpt2().config)).family == "gpt2"


def odd_module(model: Any) -> None:
    model.model.layers[1].self_attn.gate = nn.Linear(4, 4)


def odd_shape(model: Any) -> None:
    model.model.layers[0].self_attn.q_proj = nn.Linear(64, 128)


def odd_norm(model: Any) -> None:
    model.model.layers[0].input_layernorm = nn.LayerNorm(64)


def no_layers(model: Any) -> None:
    model.model.layers = nn.ModuleList()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (odd_module, r"model.layers.1 holds weights in self_attn.gate"),
        (odd_shape, r"model.layers.0 has attention projections of other shapes"),
        (odd_norm, r"model.layers.0 has a LayerNorm as input_layernorm"),
        (no_layers, r"model.layers is empty"),
    ],
)
def test_what_is_not_built_like_llama_is_refused_by_name(change: Any, message: str) -> None:
    model = FAMILIES["granite"]()
    assert find_recipe(model).family == "llama"
    change(model)
    state = fingerprint(model)
    with pytest.raises(Unsupported, match=message):
        patch_model(model, **QUIET)
    assert fingerprint(model) == state


def test_a_wrapped_linear_layer_does_not_hide_a_known_family() -> None:
    model = make_llama()
    model.model.layers[0].mlp.up_proj = torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
    assert find_recipe(model).family == "llama"
