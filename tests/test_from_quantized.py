"""Checkpoints that other tools quantized, loaded by from_pretrained into our packed layers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed_checkpoints import (
    Codes,
    awq_tensors,
    compressed_tensors_tensors,
    gptq_tensors,
    groups_in_order,
    random_codes,
)
from safetensors.torch import load_file, save_file
from tiny_models import logits, make_lfm2_moe, make_llama
from transformers import AutoModelForCausalLM

from hf_fastpath import FastpathConfig, Unsupported, fastpath_report, register
from hf_fastpath.modules import W4A16Linear

IDS = torch.randint(0, 199, (2, 9), generator=torch.Generator().manual_seed(1))
ASK = FastpathConfig(kv_cache="static", progress=False)
register()

CT_GROUP = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64}}
FORMATS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": False, "desc_act": False},
    "gptq desc_act": {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": False, "desc_act": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": CT_GROUP},
    },
}


def codes_for(name: str, weight: torch.Tensor, seed: int) -> Codes:
    n, k = weight.shape
    groups = groups_in_order(k, 64)
    if name.endswith("desc_act"):
        groups = np.random.default_rng(seed).permutation(groups)
    codes = random_codes(n, groups, seed=seed, lowest_zero=1, symmetric=name == "compressed-tensors")
    scale = torch.rand(codes.scale.shape, generator=torch.Generator().manual_seed(seed)) * 0.02 + 0.005
    return dataclasses.replace(codes, scale=scale.half())


def packed_tensors(name: str, layer: str, codes: Codes) -> dict[str, torch.Tensor]:
    if name.startswith("gptq"):
        return gptq_tensors(layer, codes)
    return awq_tensors(layer, codes) if name == "awq" else compressed_tensors_tensors(layer, codes)


def write_checkpoint(folder: Path, name: str) -> Any:
    """A checkpoint in another tool's format; the float model with the same weights."""
    twin = make_llama(
        torch.float16, hidden_size=128, intermediate_size=192, attention_bias=True, initializer_range=0.05
    )
    twin.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    linears = [(n, m) for n, m in twin.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    for seed, (layer, linear) in enumerate(linears):
        codes = codes_for(name, linear.weight, seed)
        linear.weight.data = codes.weight()
        del tensors[f"{layer}.weight"]
        tensors |= packed_tensors(name, layer, codes)
    write(folder, tensors, FORMATS[name])
    return twin


def write(folder: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


def load(folder: Path, config: FastpathConfig = ASK, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **kwargs)


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_converted_exactly_and_saved_in_our_layout(tmp_path: Path, name: str) -> None:
    twin = write_checkpoint(tmp_path / "theirs", name)
    model = load(tmp_path / "theirs")
    for layer, linear in twin.named_modules():
        ours = model.get_submodule(layer)
        if isinstance(ours, W4A16Linear):
            assert torch.equal(ours.dequantized_weight(), linear.weight)
            assert (ours.bias is None) == (linear.bias is None)
    assert sum(row.action.startswith("int4") for row in fastpath_report(model).rows) == 14
    expected, got = logits(twin, IDS).float(), logits(model, IDS).float()
    # Inputs of the CPU's int4 product are rounded to bf16, 2^-9 relative each, through two layers.
    assert float((got - expected).norm() / expected.norm()) < 0.02
    model.save_pretrained(tmp_path / "ours")
    names = set(load_file(tmp_path / "ours" / "model.safetensors"))
    assert any(n.endswith("q_proj.qweight") for n in names)
    assert not any(n.endswith((".qzeros", ".g_idx", ".weight_packed")) for n in names)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(logits(again, IDS), logits(model, IDS))
    assert torch.equal(
        model.generate(IDS, max_new_tokens=4, do_sample=False), again.generate(IDS, max_new_tokens=4, do_sample=False)
    )


def test_scales_take_the_dtype_that_the_model_is_loaded_in(tmp_path: Path) -> None:
    twin = write_checkpoint(tmp_path, "gptq")
    layer = load(tmp_path, dtype=torch.bfloat16).model.layers[0].mlp.up_proj
    assert layer.scales.dtype == torch.bfloat16
    exact = twin.model.layers[0].mlp.up_proj.weight.float()
    # A scale is rounded to bf16 (2^-8 at most), and so is its product with the code.
    torch.testing.assert_close(layer.dequantized_weight().float(), exact, rtol=2.1 * 2**-8, atol=0)


@pytest.mark.parametrize("lost", ["qweight", "scales", "qzeros"])
def test_a_missing_tensor_is_named(tmp_path: Path, lost: str) -> None:
    write_checkpoint(tmp_path, "gptq")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[f"model.layers.1.mlp.up_proj.{lost}"]
    write(tmp_path, tensors, FORMATS["gptq"])
    with pytest.raises(Unsupported, match=rf"checkpoint has no model\.layers\.1\.mlp\.up_proj\.{lost}"):
        load(tmp_path)


def test_a_layer_that_was_not_packed_after_all_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "awq")
    tensors = load_file(tmp_path / "model.safetensors")
    layer = "model.layers.1.mlp.up_proj"
    tensors = {name: value for name, value in tensors.items() if not name.startswith(layer)}
    write(tmp_path, tensors | {f"{layer}.weight": torch.zeros(192, 128).half()}, FORMATS["awq"])
    with pytest.raises(Unsupported, match=rf"checkpoint has no {layer}"):
        load(tmp_path)


def test_a_shape_that_is_not_the_models_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "gptq")
    tensors = load_file(tmp_path / "model.safetensors")
    other = codes_for("gptq", torch.empty(64, 128), 0)
    write(tmp_path, tensors | gptq_tensors("model.layers.1.mlp.up_proj", other), FORMATS["gptq"])
    with pytest.raises(ValueError, match=r"up_proj: the checkpoint has shape \(64, 128\), the model \(192, 128\)"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (FORMATS["gptq"] | {"bits": 8}, "bits 8 cannot be converted"),
        (FORMATS["awq"] | {"version": "gemv"}, "gemv"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes' cannot be converted"),
    ],
)
def test_what_cannot_be_converted_is_refused_before_loading(
    tmp_path: Path, quantization: dict[str, Any], message: str
) -> None:
    write_checkpoint(tmp_path, "gptq")
    write(tmp_path, load_file(tmp_path / "model.safetensors"), quantization)
    with pytest.raises(Unsupported, match=message):
        load(tmp_path)


@pytest.mark.parametrize("name", FORMATS)
def test_mixtures_of_experts_are_refused(name: str, tmp_path: Path) -> None:
    make_lfm2_moe(torch.float16).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": FORMATS[name]}))
    with pytest.raises(Unsupported, match="experts of a mixture are not converted"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=ASK)
