"""Everything that can be wrong with a model or a configuration, found before anything is touched."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_fastpath import packing_int8
from hf_fastpath.caches.attention import ATTENTION_NAME
from hf_fastpath.caches.compressed import CompressedLayer
from hf_fastpath.config import FastpathConfig, HeadFormat
from hf_fastpath.errors import Unsupported
from hf_fastpath.generation import CACHES
from hf_fastpath.packing import GROUP_SIZES
from hf_fastpath.patches.linears import LINEAR_TYPES, in_and_out
from hf_fastpath.patches.recipe import Recipe
from hf_fastpath.quantize import pick_group_size
from hf_fastpath.runtime import why_no_kernels

_FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclasses.dataclass(frozen=True)
class LinearPlan:
    """What will happen to one linear layer: packed in ``bits`` bits, or left (None) for this reason.

    group_size: of int4. tied: whether its weight is the embeddings', which stay.
    """

    name: str
    reason: str = ""
    bits: int | None = None
    group_size: int | None = None
    tied: bool = False


@dataclasses.dataclass(frozen=True)
class ExpertsPlan(LinearPlan):
    """What will happen to the experts of one mixture. group_size: of their ``gate_up_proj``."""

    down_group_size: int | None = None


def needs_kernels(config: FastpathConfig) -> bool:
    """Whether a model patched like this runs ops of ours, which on CUDA are kernels for 16-bit models."""
    runs_layers = config.weights is not None or config.lm_head is not None
    return runs_layers or (config.kv_cache is not None and config.kv_cache.compressed)


def check_model(model: Any, config: FastpathConfig) -> None:
    """Raises Unsupported when a loaded model as a whole cannot be patched with this configuration."""
    _check_not_quantized(model)
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        raise Unsupported("the model has tensors on the meta device: load its weights before patching")
    devices = sorted({str(tensor.device) for tensor in tensors})
    if len(devices) > 1 or any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise Unsupported(
            f"the model is spread over devices or offloaded by accelerate ({', '.join(devices)}): "
            "load it on one device, without device_map"
        )
    check_target(model, config, tensors[0].device)


def check_target(model: Any, config: FastpathConfig, device: torch.device) -> None:
    """Raises Unsupported when this configuration does not fit the model's dtype and shapes on ``device``."""
    if device.type not in ("cpu", "cuda"):
        raise Unsupported(f"the model is on {str(device)!r}: allowed are 'cpu' and 'cuda'")
    _check_cache(model, config)


def choose_reference(model: Any, config: FastpathConfig, device: torch.device) -> str:
    """ "" when a model patched like this runs as usual, else why the reference implementations run it.

    Builds or loads the kernels the first time that they are needed.

    Raises:
        Unsupported: the kernels cannot run it, and ``config.fallback`` does not ask for the references.
    """
    if device.type != "cuda" or not needs_kernels(config):
        return ""
    reason = why_no_kernels(device, model.dtype)
    if not reason and config.kv_cache is not None:
        cache = CACHES[config.kv_cache](model.config, **config.cache_options)
        layers = [layer for layer in cache.layers if isinstance(layer, CompressedLayer)]
        reason = layers[0].why_no_kernel(cache.head_dim) if layers else ""
    if reason and config.fallback is None:
        raise Unsupported(f"{reason}; fallback='reference' runs the slow PyTorch implementations instead")
    return reason


def _check_not_quantized(model: Any) -> None:
    quantizer = getattr(model, "hf_quantizer", None)
    settings = getattr(model.config, "quantization_config", None)
    if isinstance(settings, dict):
        dequantized = settings.get("dequantize", False)
    else:
        dequantized = getattr(settings, "dequantize", False)
    if (quantizer is not None or getattr(model, "is_quantized", False)) and not dequantized:
        method = getattr(model, "quantization_method", None) or type(quantizer).__name__
        raise Unsupported(
            f"the model is already quantized ({getattr(method, 'value', method)}): patch the unquantized checkpoint"
        )


def _check_cache(model: Any, config: FastpathConfig) -> None:
    if config.kv_cache is None:
        return
    CACHES[config.kv_cache](model.config, **config.cache_options)  # says no to configurations that it does not fit
    if not config.kv_cache.compressed:
        return
    if not model._can_set_attn_implementation():
        raise Unsupported(f"{type(model).__name__} does not let its attention be replaced: use kv_cache='static'")
    if model.config._attn_implementation == ATTENTION_NAME:
        raise Unsupported(
            f"the model's attn_implementation is already {ATTENTION_NAME!r}: it was set by hand, or the model shares "
            "its config object with a patched model; load it with a config of its own and another attn_implementation"
        )


def plan_linears(model: nn.Module, recipe: Recipe, config: FastpathConfig) -> list[LinearPlan]:
    """A plan for every linear layer of the model, in order, and for its experts.

    Raises:
        Unsupported: the group sizes fit none of a layer's shapes.
        ValueError: a name in skip_modules matches nothing, or a weight holds NaN or infinity.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, LINEAR_TYPES)}
    targets = _recipe_names(model, recipe) if config.packs_linears else set()
    head = _head_name(model)
    _check_skip_names(model, config)
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    if config.lm_head is not None:
        _check_head(model, head, linears)
        targets.add(head)
    missing = sorted(targets - linears.keys())
    plans = [LinearPlan(name, f"is a {_type_at(model, name)}, not a Linear") for name in missing]
    plans += [_plan_one(name, module, targets, owners, config, head) for name, module in linears.items()]
    experts = expert_names(model, recipe)
    plans += [_plan_experts(name, model.get_submodule(name), kind, config) for name, kind in experts.items()]
    _check_finite(model, plans, config)
    return plans


def expert_names(model: nn.Module, recipe: Recipe) -> dict[str, type[nn.Module]]:
    """The modules that hold the experts of a mixture, with the class that they should be of."""
    layers = model.get_submodule(recipe.decoder_layers).named_children()
    return {
        f"{recipe.decoder_layers}.{index}.{name}": kind
        for index, layer in layers
        for name, kind in recipe.experts.items()
        if name in {inside for inside, _ in layer.named_modules()}
    }


def _plan_experts(name: str, module: Any, kind: type[nn.Module], config: FastpathConfig) -> ExpertsPlan:
    reason = ""
    if any(_matches(name, skip) for skip in config.skip_modules):
        reason = "in skip_modules"
    elif not config.packs_linears:
        reason = _left(config)
    elif type(module) is not kind:
        reason = f"is a {_type_name(module)}, not a plain {kind.__name__}"
    elif any(type(weight) is not nn.Parameter for weight in module.parameters()):
        reason = "its weights are no plain parameters"
    elif module.gate_up_proj.dtype not in _FLOAT_DTYPES:
        reason = f"its weights are {module.gate_up_proj.dtype}"
    elif "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        reason = "has hooks or a forward of its own, which a new module would lose"
    if reason:
        return ExpertsPlan(name, reason)
    sizes = []
    for key, weight in (("gate_up_proj", module.gate_up_proj), ("down_proj", module.down_proj)):
        sizes.append(pick_group_size(weight.shape[-1], config.group_size))
        if sizes[-1] is None:
            allowed = ", ".join(str(size) for size in GROUP_SIZES if size <= config.group_size)
            raise Unsupported(
                f"{name}.{key}: {weight.shape[-1]} input features are not a multiple of any int4 group size "
                f"({allowed}); add {name.split('.')[-1]!r} to skip_modules to leave it in full precision"
            )
    return ExpertsPlan(name, bits=4, group_size=sizes[0], down_group_size=sizes[1])


def _left(config: FastpathConfig) -> str:
    return "weights=None" if config.weights is None else f"weights={config.weights.value!r}"


def packed_weights(plan: LinearPlan) -> tuple[str, ...]:
    """The names of the parameters that a plan packs."""
    keys = ("gate_up_proj", "down_proj") if isinstance(plan, ExpertsPlan) else ("weight",)
    return tuple(f"{plan.name}.{key}" for key in keys)


def _recipe_names(model: nn.Module, recipe: Recipe) -> set[str]:
    names = set()
    for index, layer in model.get_submodule(recipe.decoder_layers).named_children():
        there = {name for name, _ in layer.named_modules()}
        parents = {name.rpartition(".")[0] for name in recipe.linears if name in there}
        own = [name for name in recipe.linears if name.rpartition(".")[0] in parents]
        names |= {f"{recipe.decoder_layers}.{index}.{name}" for name in own}
    return names


def _head_name(model: Any) -> str:
    """The module name of the language-model head; "" if the model has none."""
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), "")


def _check_head(model: Any, head: str, linears: dict[str, Any]) -> None:
    if head not in linears:
        raise Unsupported(f"lm_head: {type(model).__name__} has no linear language-model head; use lm_head=None")


def _type_at(model: nn.Module, name: str) -> str:
    try:
        return _type_name(model.get_submodule(name))
    except AttributeError:
        raise Unsupported(
            f"this {type(model).__name__} has no {name}: it was changed since it was loaded, and cannot be patched"
        ) from None


def _type_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _matches(name: str, skip: str) -> bool:
    return name == skip or name.startswith(f"{skip}.") or skip in name.split(".")


def _check_skip_names(model: nn.Module, config: FastpathConfig) -> None:
    names = [name for name, _ in model.named_modules()]
    for skip in config.skip_modules:
        if not any(_matches(name, skip) for name in names):
            raise ValueError(f"FastpathConfig.skip_modules: {skip!r} matches no module of {type(model).__name__}")


def _plan_one(
    name: str, module: Any, targets: set[str], owners: dict[int, list[str]], config: FastpathConfig, head: str
) -> LinearPlan:
    reason = ""
    shared = owners.get(id(module.weight), [name])
    tied = name == head and len(shared) == 2
    if any(_matches(name, skip) for skip in config.skip_modules):
        reason = "in skip_modules"
    elif name == head and config.lm_head is None:
        reason = "lm_head=None"
    elif name != head and not config.packs_linears:
        reason = _left(config)
    elif name not in targets:
        reason = "not in the recipe"
    elif type(module) not in LINEAR_TYPES:
        reason = f"is a {_type_name(module)}, not a plain Linear"
    elif len(shared) > 1 and not tied:
        reason = f"shares its weight with {next(other for other in shared if other != name)}"
    elif type(module.weight) is not nn.Parameter:
        reason = f"its weight is a {_type_name(module.weight)}, not a plain parameter"
    elif "forward" in vars(module):
        reason = "its forward was replaced by something else"
    elif module.weight.dtype not in _FLOAT_DTYPES:
        reason = f"its weight is {module.weight.dtype}"
    elif module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        reason = "has hooks, which a new module would lose"
    if reason:
        return LinearPlan(name, reason)
    in_features, _ = in_and_out(module)
    if name == head and config.lm_head is HeadFormat.INT8:
        if in_features % packing_int8.TILE_COLS:
            raise Unsupported(
                f"{name}: in_features {in_features} is not a multiple of {packing_int8.TILE_COLS}, which int8 "
                "needs; use lm_head=None"
            )
        return LinearPlan(name, bits=8, tied=tied)
    group_size = pick_group_size(in_features, config.group_size)
    if group_size is None:
        sizes = ", ".join(str(size) for size in GROUP_SIZES if size <= config.group_size)
        raise Unsupported(
            f"{name}: in_features {in_features} is not a multiple of any int4 group size ({sizes}); "
            f"add {name.split('.')[-1]!r} to skip_modules to leave it in full precision"
        )
    return LinearPlan(name, bits=4, group_size=group_size, tied=tied)


def _check_finite(model: nn.Module, plans: list[LinearPlan], config: FastpathConfig) -> None:
    todo = [name for plan in plans if plan.bits is not None for name in packed_weights(plan)]
    todo = [name for name in todo if not model.get_parameter(name).is_meta]  # while loading, quantize_int4 checks alone
    for name in tqdm(todo, desc="Checking weights", unit="layer", disable=not (config.progress and todo), leave=False):
        low, high = torch.aminmax(model.get_parameter(name).detach())  # NaN in, NaN out; and it takes no memory
        if not bool((low.isfinite() & high.isfinite()).item()):
            name = name.removesuffix(".weight")
            raise ValueError(f"{name}: the weight holds NaN or infinity, which int4 cannot store")
