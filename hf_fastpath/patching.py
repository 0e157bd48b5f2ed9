"""patch_model and unpatch_model: check everything, then apply a family's recipe, keeping what it takes to undo it."""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_fastpath import generation
from hf_fastpath.activations import input_energy
from hf_fastpath.blockwise import quantize_blockwise
from hf_fastpath.caches.attention import ATTENTION_NAME
from hf_fastpath.calibration import check_tokens, self_written_tokens
from hf_fastpath.checks import LinearPlan, check_model, needs_kernels, plan_linears
from hf_fastpath.config import FastpathConfig, KVFormat, ScaleSearch
from hf_fastpath.errors import Unsupported
from hf_fastpath.modules import W4A16Linear
from hf_fastpath.patches import find_recipe
from hf_fastpath.patches.recipe import Recipe
from hf_fastpath.quantize import GroupQuantized, quantize_int4
from hf_fastpath.report import LEFT, FastpathReport, ReportRow, module_bytes
from hf_fastpath.runtime import require_device

STATE = "_fastpath"


@dataclasses.dataclass
class PatchState:
    """What a patched model carries, as ``model._fastpath``: enough to undo the patch and to report it."""

    config: FastpathConfig
    recipe: Recipe
    dtype: torch.dtype  # the model's, when it was patched
    attn_implementation: str | None
    replaced: dict[str, nn.Linear | None]  # module name -> the original, when kept
    report: FastpathReport


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
    config = FastpathConfig.build(config, overrides)
    if hasattr(model, STATE):
        raise Unsupported("this model is already patched by hf_fastpath: call unpatch_model(model) first")
    recipe = find_recipe(model)
    check_model(model, config)
    plans = plan_linears(model, recipe, config)
    if calibration is not None:
        calibration = _check_calibration(model, config, calibration)
    if needs_kernels(config):
        require_device(model.device)
    generation.register()

    before = module_bytes(model)
    empty = FastpathReport("", (), ())
    state = PatchState(config, recipe, model.dtype, model.config._attn_implementation, {}, empty)
    try:
        _replace_linears(model, recipe, plans, config, calibration, state.replaced)
        _install_cache(model, config)
    except BaseException as error:
        _restore(model, state)
        if state.replaced and not config.keep_original:
            error.add_note(
                f"hf_fastpath was interrupted: {len(state.replaced)} linear layers now hold the values of their int4 "
                "weights; load the model again"
            )
        raise
    if state.replaced:
        # functools.partial, not a bound method: those pickle as an attribute of the model, which these are not.
        model.save_pretrained = functools.partial(_refuse_to_save, model)
    state.report = _build_report(model, state, plans, before)
    setattr(model, STATE, state)
    return model


def _install_cache(model: Any, config: FastpathConfig) -> None:
    if config.kv_cache is None:
        return
    if config.kv_cache is KVFormat.INT8:  # a static cache returns plain tensors, which any attention takes
        model.set_attn_implementation(ATTENTION_NAME)
    model._prepare_cache_for_generation = functools.partial(generation.prepare_default_cache, model)
    model.register_forward_pre_hook(generation.supply_default_cache, with_kwargs=True)


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
    for name, original in state.replaced.items():
        packed = model.get_submodule(name)
        if original is None:
            restored = _plain_linear(packed, model.dtype)
        else:
            restored = original.to(device=packed.scales.device)
            if model.dtype != state.dtype:
                restored.to(dtype=model.dtype)
        model.set_submodule(name, restored.train(packed.training))
    if model.config._attn_implementation == ATTENTION_NAME and state.attn_implementation != ATTENTION_NAME:
        model.set_attn_implementation(state.attn_implementation)
    for name in ("_prepare_cache_for_generation", "save_pretrained", STATE):
        model.__dict__.pop(name, None)
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


def _check_calibration(model: Any, config: FastpathConfig, calibration: Any) -> torch.Tensor:
    if config.weights is None or config.scale_search is not ScaleSearch.OUTPUT:
        raise ValueError("calibration is for weights='w4a16' with scale_search='output', and nothing else reads it")
    return check_tokens(calibration, model.config.vocab_size)


def _replace_linears(
    model: Any,
    recipe: Recipe,
    plans: list[LinearPlan],
    config: FastpathConfig,
    calibration: torch.Tensor | None,
    replaced: dict[str, nn.Linear | None],
) -> None:
    """Quantizes and swaps layer by layer, noting each in ``replaced``; one layer at a time exists in both forms."""
    todo = [plan for plan in plans if plan.group_size is not None]
    for plan, quantized in _quantized(model, recipe, todo, config, calibration) if todo else ():
        original = model.get_submodule(plan.name)
        packed = W4A16Linear.from_quantized(quantized, original.bias)
        packed.train(original.training)
        kept = original.to("cpu") if config.keep_original else None
        model.set_submodule(plan.name, packed)
        replaced[plan.name] = kept
        del original
    if todo and torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def _quantized(
    model: Any, recipe: Recipe, todo: list[LinearPlan], config: FastpathConfig, calibration: torch.Tensor | None
) -> Iterator[tuple[LinearPlan, GroupQuantized]]:
    """Each layer's int4 weight; the layer is to be swapped before the next one is asked for."""
    if config.scale_search is ScaleSearch.OUTPUT:
        tokens = self_written_tokens(model, progress=config.progress) if calibration is None else calibration
        yield from quantize_blockwise(model, recipe, todo, config, tokens)
        return
    energy: dict[str, torch.Tensor] = {}
    if config.scale_search is ScaleSearch.ACTIVATION:
        energy = input_energy(model, [plan.name for plan in todo], progress=config.progress)
    for plan in tqdm(todo, desc="Quantizing to int4", unit="layer", disable=not config.progress):
        assert plan.group_size is not None
        yield (
            plan,
            quantize_int4(
                model.get_submodule(plan.name).weight,
                plan.group_size,
                zero_points=config.zero_points,
                search=config.scale_search,
                importance=energy.get(plan.name),
            ),
        )


def _plain_linear(packed: W4A16Linear, dtype: torch.dtype) -> nn.Linear:
    weight = packed.dequantized_weight().to(dtype)
    linear = nn.Linear(packed.in_features, packed.out_features, bias=packed.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight)
    if packed.bias is not None:
        linear.bias = nn.Parameter(packed.bias.detach().to(dtype, copy=True))
    return linear


def _remove_forward_pre_hook(model: nn.Module, hook: Any) -> None:
    for key in [key for key, value in model._forward_pre_hooks.items() if value is hook]:
        del model._forward_pre_hooks[key]
        model._forward_pre_hooks_with_kwargs.pop(key, None)


def _refuse_to_save(self: Any, *args: Any, **kwargs: Any) -> None:
    raise Unsupported(
        "saving a model with packed int4 weights is not supported yet: a checkpoint written now could not be loaded. "
        "Save the original model and patch it after loading, or unpatch_model(model) first"
    )


def _build_report(
    model: nn.Module, state: PatchState, plans: list[LinearPlan], before: dict[str, int]
) -> FastpathReport:
    after, planned = module_bytes(model), {plan.name: plan for plan in plans}
    rows = []
    # A wrapper around a layer (LoRA, a parametrization) holds no tensor itself, but was meant to be replaced.
    wrappers = {name: 0 for name in planned if name not in before}
    for name, size in (before | wrappers).items():
        module = model.get_submodule(name)
        if isinstance(module, W4A16Linear):
            kind, action = "Linear", f"int4 g{module.group_size}" + ("" if module.zeros is None else " + zeros")
            reason = ""
        else:
            kind, action = type(module).__name__, LEFT
            reason = planned[name].reason if name in planned else "not a linear layer of the recipe"
            if size == 0 and name in before:
                reason = "its tensor is tied to one counted above; " + reason
        rows.append(ReportRow(name, kind, action, reason, size, after.get(name, 0)))
    return FastpathReport(f"{type(model).__name__}, recipe {state.recipe.family!r}", tuple(rows), _notes(model, state))


def _notes(model: Any, state: PatchState) -> tuple[str, ...]:
    device = model.device
    kv_cache = state.config.kv_cache
    if kv_cache is None:
        cache = "KV cache and attention: transformers' own"
    else:
        cache = (
            f"KV cache: {kv_cache.value} by default in generate() and model(...); attention: "
            + (f"{ATTENTION_NAME} instead of " if kv_cache is KVFormat.INT8 else "")
            + str(state.attn_implementation)
        )
    if device.type == "cuda":
        runs = f"Runs on {torch.cuda.get_device_name(device)}"
    else:
        parts = ["torch's int4 product"] if state.replaced else []
        parts += ["int8 attention by its reference implementation"] if kv_cache is KVFormat.INT8 else []
        runs = f"Runs on the CPU: {', '.join(parts) or 'as before'}"
    originals = "kept in CPU memory" if state.config.keep_original else "freed"
    return (cache, runs, *([f"Original weights of replaced layers: {originals}"] if state.replaced else []))
