"""What patch_model refuses or leaves alone: in words, and with the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import fingerprint, logits, make_llama
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaForCausalLM

from hf_fastpath import Unsupported, fastpath_report, patch_model, unpatch_model
from hf_fastpath.modules import W4A16Linear

QUIET = {"progress": False}


def with_wrapped_linear(model: LlamaForCausalLM) -> LlamaForCausalLM:
    class Wrapped(nn.Linear):
        pass

    model.model.layers[0].mlp.up_proj.__class__ = Wrapped
    return model


def with_hook(model: LlamaForCausalLM) -> LlamaForCausalLM:
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    return model


def with_own_forward(model: LlamaForCausalLM) -> LlamaForCausalLM:
    linear = model.model.layers[0].mlp.up_proj
    linear.forward = lambda x: nn.Linear.forward(linear, x)
    return model


def with_tensor_subclass(model: LlamaForCausalLM) -> LlamaForCausalLM:
    class Quantized(nn.Parameter):
        pass

    linear = model.model.layers[0].mlp.up_proj
    linear.weight = Quantized(linear.weight.detach())
    return model


def with_parametrization(model: LlamaForCausalLM) -> LlamaForCausalLM:
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
    return model


def with_shared_weight(model: LlamaForCausalLM) -> LlamaForCausalLM:
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
    return model


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_wrapped_linear, "Wrapped, not a plain Linear"),
        (with_hook, "has hooks"),
        (with_shared_weight, "shares its weight with"),
        (with_own_forward, "its forward was replaced"),
        (with_tensor_subclass, "not a plain parameter"),
        (with_parametrization, "ParametrizedLinear"),
    ],
)
def test_layers_that_cannot_be_replaced_are_left_and_named(change: Callable[..., Any], reason: str) -> None:
    model = patch_model(change(make_llama()), **QUIET)
    row = {row.name: row for row in fastpath_report(model).rows}["model.layers.0.mlp.up_proj"]
    assert row.action == "left"
    assert reason in row.reason
    assert not isinstance(model.model.layers[0].mlp.up_proj, W4A16Linear)


def already_patched() -> Any:
    return patch_model(make_llama(), **QUIET)


def quantized_elsewhere() -> Any:
    model = make_llama()
    model.is_quantized, model.hf_quantizer = True, object()
    return model


def shared_config() -> Any:
    model = make_llama()
    other = LlamaForCausalLM(model.config)
    patch_model(model, weights=None)
    return other


def without_a_linear() -> Any:
    model = make_llama()
    del model.model.layers[0].mlp.up_proj
    return model


def nan_weight() -> Any:
    model = make_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    return model


def gpt_neox() -> Any:
    return GPTNeoXForCausalLM(GPTNeoXConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, vocab_size=99))


def offloaded() -> Any:
    model = make_llama()
    model.model.layers[0]._hf_hook = object()
    return model


@pytest.mark.parametrize(
    ("build", "overrides", "message"),
    [
        (already_patched, {}, "already patched"),
        (gpt_neox, {}, "GPTNeoXForCausalLM is not a supported model.*it has no model.layers"),
        (lambda: make_llama().model, {}, "LlamaModel is not a supported model: supported are LlamaForCausalLM"),
        (lambda: make_llama().to("meta"), {}, "meta device"),
        (quantized_elsewhere, {}, "already quantized"),
        (offloaded, {}, "device_map"),
        (shared_config, {}, "shares its config object"),
        (without_a_linear, {}, "has no model.layers.0.mlp.up_proj"),
        (lambda: make_llama(hidden_size=100), {}, "in_features 100 is not a multiple of any int4 group size"),
        (lambda: make_llama(intermediate_size=64, hidden_size=48), {"group_size": 32}, "skip_modules to leave"),
        (nan_weight, {}, "model.layers.1.mlp.up_proj: the weight holds NaN"),
        (make_llama, {"skip_modules": ("lm_head", "dwon_proj")}, "'dwon_proj' matches no module"),
        (make_llama, {"kv_cache": "int3"}, "allowed are 'static', 'int8', 'fp8', 'int4', 'h2o', None"),
        (make_llama, {"bits": 4}, "has no 'bits'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals_are_clear_and_leave_the_model_alone(
    build: Callable[[], Any], overrides: dict[str, Any], message: str
) -> None:
    model = build()
    state = fingerprint(model) if hasattr(model, "generation_config") else None
    with pytest.raises(ValueError, match=message):
        patch_model(model, **QUIET, **overrides)
    if state is not None:
        assert fingerprint(model) == state


@pytest.mark.parametrize(("search", "message"), [("activation", "on random tokens"), ("output", "cannot write a text")])
def test_activations_that_overflow_are_refused(search: str, message: str) -> None:
    model = make_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(1e38)
    state = fingerprint(model)
    with pytest.raises(ValueError, match=f"not finite.*{message}.*scale_search='mse'"):
        patch_model(model, scale_search=search, **QUIET)
    assert fingerprint(model) == state


def test_unpatched_models_have_no_report() -> None:
    for call in (fastpath_report, unpatch_model):
        with pytest.raises(Unsupported, match="LlamaForCausalLM is not patched"):
            call(make_llama())


def test_an_unpatched_model_is_saved_as_it_was(tmp_path: Any, prompt: torch.Tensor) -> None:
    model = patch_model(make_llama(), keep_original=True, **QUIET)
    unpatch_model(model).save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, prompt), logits(model, prompt))
    assert again.config._attn_implementation == "sdpa"


def test_a_model_dequantized_while_loading_is_not_refused() -> None:
    model = make_llama()
    model.is_quantized, model.hf_quantizer = True, object()
    model.config.quantization_config = {"quant_method": "gguf", "dequantize": True}
    patch_model(model, **QUIET)


def test_other_devices_are_refused() -> None:
    from hf_fastpath.runtime import require_device

    with pytest.raises(Unsupported, match="allowed are 'cpu' and 'cuda'"):
        require_device(torch.device("mps"))
