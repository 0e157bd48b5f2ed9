"""Quantizing while loading, saving packed weights, loading them back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_models import logits, make_llama
from transformers import AutoModelForCausalLM

from hf_fastpath import FastpathConfig, Unsupported, fastpath_report, patch_model, register, unpatch_model
from hf_fastpath.config import ScaleSearch
from hf_fastpath.modules import W4A16Linear

IDS = torch.randint(0, 199, (2, 9), generator=torch.Generator().manual_seed(1))
QUIET = FastpathConfig(progress=False)  # while loading, scale_search="auto" is "activation"
FAST = FastpathConfig(scale_search="absmax", progress=False)


def load(folder: Path, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def small_llama(**overrides: Any) -> Any:
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3}
    return make_llama(torch.bfloat16, **(sizes | overrides))


@pytest.fixture(scope="module")
def float_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("float")
    small_llama(num_hidden_layers=12).save_pretrained(folder)  # layers 10 and 11 come after 2 only in natural order
    return folder


@pytest.fixture(scope="module")
def packed_folder(tmp_path_factory: pytest.TempPathFactory, float_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    load(float_folder, quantization_config=FAST).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("search", ["activation", "mse", "absmax"])
def test_quantizing_while_loading_gives_what_patch_model_gives(float_folder: Path, search: str) -> None:
    patched = patch_model(load(float_folder), scale_search=search, progress=False)
    loaded = load(float_folder, quantization_config=FastpathConfig(scale_search=search, progress=False))
    assert torch.equal(logits(loaded, IDS), logits(patched, IDS))
    assert str(fastpath_report(loaded)) == str(fastpath_report(patched))
    assert loaded.is_quantized


def test_searching_by_output_needs_the_whole_model(float_folder: Path) -> None:
    with pytest.raises(Unsupported, match="use 'auto' here"):
        load(float_folder, quantization_config=FastpathConfig(scale_search="output"))
    auto = load(float_folder, quantization_config=QUIET)
    assert auto._fastpath.config.scale_search is ScaleSearch.ACTIVATION


def test_biases_survive_loading(tmp_path: Path) -> None:
    small_llama(attention_bias=True, mlp_bias=True).save_pretrained(tmp_path / "float")
    patched = patch_model(load(tmp_path / "float"), scale_search="activation", progress=False)
    patched.save_pretrained(tmp_path / "packed")
    for folder, config in ((tmp_path / "float", QUIET), (tmp_path / "packed", None)):
        loaded = load(folder, quantization_config=config) if config else load(folder)
        assert torch.equal(logits(loaded, IDS), logits(patched, IDS))


def test_at_most_one_layer_is_held_unpacked(float_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_fastpath import loading

    held = []
    replace = loading.replace_linear

    def counting(model: Any, *args: Any) -> None:
        linears = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
        held.append(sum(not linear.weight.is_meta for linear in linears))
        replace(model, *args)

    monkeypatch.setattr(loading, "replace_linear", counting)
    load(float_folder, quantization_config=QUIET)
    assert held == [7, 6, 5, 4, 3, 2, 1] * 12


def test_a_saved_model_is_small_and_reloads_bit_identically(float_folder: Path, packed_folder: Path) -> None:
    float_file, packed_file = (folder / "model.safetensors" for folder in (float_folder, packed_folder))
    assert packed_file.stat().st_size < 0.4 * float_file.stat().st_size
    with safe_open(packed_file, "pt") as tensors:
        names = set(tensors.keys())
    assert not any("proj.weight" in name for name in names)
    reloaded = load(packed_folder)
    patched = patch_model(load(float_folder), FAST)
    assert torch.equal(logits(reloaded, IDS), logits(patched, IDS))
    ours, theirs = (fastpath_report(m).rows for m in (reloaded, patched))
    assert [(r.name, r.action, r.bytes_before) for r in ours] == [(r.name, r.action, r.bytes_before) for r in theirs]
    ids = reloaded.generate(IDS, max_new_tokens=5, do_sample=False)
    assert torch.equal(ids, patched.generate(IDS, max_new_tokens=5, do_sample=False))


def test_a_reloaded_model_can_be_saved_again(packed_folder: Path, tmp_path: Path) -> None:
    load(packed_folder).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (packed_folder / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((packed_folder / "config.json").read_text())


def test_saving_a_model_patched_in_place_leaves_its_config_alone(float_folder: Path, tmp_path: Path) -> None:
    model = patch_model(load(float_folder), FAST)
    model.save_pretrained(tmp_path)
    assert not hasattr(model.config, "quantization_config")
    assert torch.equal(logits(load(tmp_path), IDS), logits(model, IDS))


def test_shards(packed_folder: Path, tmp_path: Path) -> None:
    model = load(packed_folder)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert torch.equal(logits(load(tmp_path), IDS), logits(model, IDS))


def test_a_config_passed_for_a_packed_checkpoint_chooses_the_cache_alone(packed_folder: Path) -> None:
    asked = FastpathConfig(kv_cache="static", group_size=32, progress=False)
    config = load(packed_folder, quantization_config=asked)._fastpath.config
    assert (config.kv_cache.value, config.group_size) == ("static", 128)
    asked = FastpathConfig(kv_cache="h2o", kv_budget=64, kv_window=10, kv_sinks=2, progress=False)
    assert load(packed_folder, quantization_config=asked)._fastpath.config.cache_options == asked.cache_options


def test_unpatching_a_reloaded_model_leaves_a_plain_one(packed_folder: Path, tmp_path: Path) -> None:
    model = load(packed_folder)
    packed = model.model.layers[1].mlp.up_proj.dequantized_weight()
    with pytest.raises(Unsupported, match="were not kept"):
        unpatch_model(model)
    unpatch_model(model, dequantize=True)
    assert not model.is_quantized
    assert not any(isinstance(module, W4A16Linear) for module in model.modules())
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, packed)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_originals_can_be_kept_while_loading(float_folder: Path) -> None:
    model = load(float_folder, quantization_config=FastpathConfig(keep_original=True, progress=False))
    assert torch.equal(logits(unpatch_model(model), IDS), logits(load(float_folder), IDS))


def test_lossless_mode_while_loading(float_folder: Path) -> None:
    config = FastpathConfig(weights=None, kv_cache="static", progress=False)
    model = load(float_folder, quantization_config=config)
    assert torch.equal(logits(model, IDS), logits(load(float_folder), IDS))


def test_a_tensor_missing_from_the_checkpoint_is_initialized_as_usual(float_folder: Path, tmp_path: Path) -> None:
    model = load(float_folder)
    state = {name: value for name, value in model.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded, info = load(tmp_path, quantization_config=QUIET, output_loading_info=True)
    assert list(info["missing_keys"]) == ["model.layers.1.mlp.up_proj.weight"]
    assert isinstance(loaded.model.layers[1].mlp.up_proj, W4A16Linear)


@pytest.mark.parametrize("device_map", [{"model": "cpu", "lm_head": "disk"}, {"model": 0, "lm_head": 1}, {"": "disk"}])
def test_several_devices_are_refused_before_anything_is_loaded(float_folder: Path, device_map: Any) -> None:
    with pytest.raises(Unsupported, match="onto one device"):
        load(float_folder, quantization_config=QUIET, device_map=device_map)


def test_auto_means_one_device(float_folder: Path) -> None:
    model = load(float_folder, quantization_config=QUIET, device_map="auto")
    assert {str(parameter.device) for parameter in model.parameters()} == {
        "cuda:0" if torch.cuda.is_available() else "cpu"
    }


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = small_llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: the weight holds NaN or infinity"):
        load(tmp_path, quantization_config=QUIET)


def test_unsupported_models_and_shapes_are_refused(tmp_path: Path) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(num_hidden_layers=1, hidden_size=64, num_attention_heads=2, vocab_size=99)
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "neox")
    with pytest.raises(Unsupported, match="GPTNeoXForCausalLM is not a supported model"):
        load(tmp_path / "neox", quantization_config=QUIET)
    small_llama(intermediate_size=200).save_pretrained(tmp_path / "odd")
    with pytest.raises(Unsupported, match="in_features 200"):
        load(tmp_path / "odd", quantization_config=QUIET)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packed": None}, "cannot be read"),
        ({"config": {"group_size": 48}}, "allowed are 128, 64, 32"),
        ({"packed": [{"format": "int2", "modules": ["a"]}]}, "weight formats \\['int2'\\]"),
    ],
)
def test_a_description_that_cannot_be_read_is_refused(
    packed_folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    load(packed_folder).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Unsupported, match=message):
        load(tmp_path)


def test_registering_twice_changes_nothing() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoHfQuantizer

    register()
    first = (dict(AUTO_QUANTIZER_MAPPING), AutoHfQuantizer.merge_quantization_configs.__func__)
    register()
    assert (dict(AUTO_QUANTIZER_MAPPING), AutoHfQuantizer.merge_quantization_configs.__func__) == first


def test_a_packed_tensor_missing_from_the_checkpoint_is_named(packed_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    load(packed_folder).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.scales"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Unsupported, match=r"no model\.layers\.1\.mlp\.up_proj\.scales"):
        load(tmp_path)
