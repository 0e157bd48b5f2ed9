"""patch_model and unpatch_model: check everything, then apply a family's recipe, keeping what it takes to undo it."""

from __future__ import annotations

from typing import Any

from torch import nn
from tqdm.auto import tqdm

from hf_fastpath import generation
from hf_fastpath.activations import input_energy
from hf_fastpath.blockwise import quantize_blockwise
from hf_fastpath.caches.attention import ATTENTION_NAME
from hf_fastpath.calibration import check_tokens, self_written_tokens
from hf_fastpath.checks import ExpertsPlan, LinearPlan, check_model, choose_reference, plan_linears
from hf_fastpath.config import FastpathConfig, HeadFormat, ScaleSearch
from hf_fastpath.errors import Unsupported
from hf_fastpath.modules import PackedExperts, PackedLinear, W4A16Linear
from hf_fastpath.patches import find_recipe
from hf_fastpath.patches.linears import plain_experts, plain_linear
from hf_fastpath.registration import register
from hf_fastpath.report import FastpathReport, module_bytes
from hf_fastpath.saving import forget_quantization
from hf_fastpath.steps import INSTALLED, STATE, PatchState, finish_patch, put_packed, replace_linear
from hf_fastpath.tying import tie_again


def patch_model(
    model: Any, config: FastpathConfig | dict[str, Any] | None = None, *, calibration: Any = None, **overrides: Any
) -> Any:
    """Makes a loaded transformers model run on int4 weights and a compressed KV cache, in place.

    ``generate()`` and ``model(...)`` stay what they were for the caller. The original float weights are freed one layer
    at a time while the int4 ones are made, unless ``keep_original=True``.

    Args:
        model: a transformers model of a supported family, on the CPU or on one CUDA GPU, not quantized.
        config: a :class:`FastpathConfig` or a dict of its fields; ``overrides`` are single fields on top.
        calibration: for ``scale_search="output"``, token ids ``(n, T)`` of a text like those that the model will
            read, a tensor or n sequences of one length (:func:`hf_fastpath.calibration.calibration_tokens` makes
            them). None: the model writes its own.

    Returns:
        The same model object.

    Raises:
        ValueError: a bad configuration value, bad token ids, or weights that hold NaN or infinity.
        Unsupported: this model cannot be patched; the message says why and what is possible.
            In both cases the model is as it was.
    """
    config = FastpathConfig.build(config, overrides).with_search(ScaleSearch.OUTPUT)
    if hasattr(model, STATE):
        raise Unsupported("this model is already patched by hf_fastpath: call unpatch_model(model) first")
    recipe = find_recipe(model)
    check_model(model, config)
    plans = plan_linears(model, recipe, config)
    if calibration is not None:
        calibration = _check_calibration(model, config, calibration)
    reference = choose_reference(model, config, model.device)
    register()

    before = module_bytes(model)
    state = PatchState.new(model, config, recipe, reference)
    try:
        _replace_linears(model, plans, state, calibration)
        finish_patch(model, state, plans, before)
    except BaseException as error:
        _restore(model, state)
        if state.replaced and not config.keep_original:
            error.add_note(
                f"hf_fastpath was interrupted: {len(state.replaced)} linear layers now hold the values of their int4 "
                "weights; load the model again"
            )
        raise
    return model


def unpatch_model(model: Any, *, dequantize: bool = False) -> Any:
    """Undoes :func:`patch_model`, in place.

    With originals kept (``keep_original=True``) the model is the same modules and tensors as before, on its present
    device (and in its present dtype, if that was changed meanwhile), and its logits are bit-identical.

    Args:
        dequantize: where originals were not kept, put in plain linear layers that hold the int4 weights' values.

    Raises:
        Unsupported: the model is not patched, or the original weights were not kept and ``dequantize`` is False; the
            model is left as it was.
    """
    state = _state(model)
    gone = [name for name, original in state.replaced.items() if original is None]
    if gone and not dequantize:
        raise Unsupported(
            f"the original weights of {len(gone)} linear layers ({gone[0]}, ...) were not kept, so they cannot be "
            "restored: load the model again and patch it with keep_original=True, or call "
            "unpatch_model(model, dequantize=True) for plain linear layers with the int4 weights' values"
        )
    _restore(model, state)
    return model


def _restore(model: Any, state: PatchState) -> None:
    """Takes out whatever part of a patch is there."""
    for name, kind in state.swapped.items():
        module = model.get_submodule(name)
        if hasattr(module, "forget"):
            module.forget()
        module.__class__ = kind
    for name, original in state.replaced.items():
        packed = model.get_submodule(name)
        if original is None:
            restored = _plain_layer(packed, state.kinds[name], model)
        elif state.tie and state.tie.name == name:
            restored = original
        else:
            restored = original.to(device=packed.scales.device)
            if model.dtype != state.dtype:
                restored.to(dtype=model.dtype)
        model.set_submodule(name, restored.train(packed.training))
    if state.tie:
        tie_again(model, state.tie)
    if model.config._attn_implementation == ATTENTION_NAME and state.attn_implementation != ATTENTION_NAME:
        model.set_attn_implementation(state.attn_implementation)
    if state.graphs:
        state.graphs.release()
    for name in INSTALLED:
        model.__dict__.pop(name, None)
    forget_quantization(model)
    _remove_forward_pre_hook(model, generation.supply_default_cache)


def fastpath_report(model: Any) -> FastpathReport:
    """What :func:`patch_model` did to every module, and why; ``print`` it.

    Raises:
        Unsupported: the model is not patched.
    """
    return _state(model).report


def _state(model: Any) -> PatchState:
    state = getattr(model, STATE, None)
    if state is None:
        raise Unsupported(f"this {type(model).__name__} is not patched by hf_fastpath")
    return state


def _check_calibration(model: Any, config: FastpathConfig, calibration: Any) -> Any:
    int4 = config.packs_linears or config.lm_head is HeadFormat.INT4
    if not int4 or config.scale_search is not ScaleSearch.OUTPUT:
        raise ValueError("calibration is for int4 weights with scale_search='output', and nothing else reads it")
    return check_tokens(calibration, model.config.vocab_size)


def _replace_linears(model: Any, plans: list[LinearPlan], state: PatchState, calibration: Any) -> None:
    """Quantizes and swaps layer by layer, noting each in ``replaced``; one layer at a time exists in both forms."""
    config = state.config
    todo = [plan for plan in plans if plan.bits is not None]
    energy: dict[str, Any] = {}
    int4 = [plan for plan in todo if plan.bits == 4]
    if int4 and config.scale_search is ScaleSearch.OUTPUT:
        tokens = self_written_tokens(model, progress=config.progress) if calibration is None else calibration
        for plan, quantized in quantize_blockwise(model, state.recipe, int4, config, tokens):
            if isinstance(plan, ExpertsPlan):
                put_packed(model, plan, state, PackedExperts.from_quantized(*quantized))
            else:
                bias = model.get_submodule(plan.name).bias
                put_packed(model, plan, state, W4A16Linear.from_quantized(quantized, bias))
        todo = [plan for plan in todo if plan.bits != 4]
    elif int4 and config.scale_search is ScaleSearch.ACTIVATION:
        experts = [plan.name for plan in int4 if isinstance(plan, ExpertsPlan)]
        names = [plan.name for plan in int4 if plan.name not in experts]
        energy = input_energy(model, state.recipe.decoder_layers, names, experts, progress=config.progress)
    for plan in tqdm(todo, desc="Quantizing", unit="layer", disable=not (config.progress and todo)):
        replace_linear(model, plan, state, energy.get(plan.name))


def _plain_layer(packed: PackedLinear | PackedExperts, kind: type[nn.Module], model: Any) -> nn.Module:
    dtype = model.dtype
    if isinstance(packed, PackedExperts):
        gate_up, down = packed.dequantized_weights()
        return plain_experts(kind, model.config, gate_up.to(dtype), down.to(dtype))
    bias = None if packed.bias is None else packed.bias.detach().to(dtype, copy=True)
    return plain_linear(kind, packed.dequantized_weight().to(dtype), bias)


def _remove_forward_pre_hook(model: nn.Module, hook: Any) -> None:
    for key in [key for key, value in model._forward_pre_hooks.items() if value is hook]:
        del model._forward_pre_hooks[key]
        model._forward_pre_hooks_with_kwargs.pop(key, None)
