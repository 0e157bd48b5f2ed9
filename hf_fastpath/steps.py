"""The steps that ``patch_model`` and ``from_pretrained`` share, and the record that a patched model carries."""

from __future__ import annotations

import collections
import dataclasses
import functools
import gc
from typing import Any

import torch
from torch import nn

from hf_fastpath import generation
from hf_fastpath.caches.attention import ATTENTION_NAME
from hf_fastpath.checks import ExpertsPlan, LinearPlan
from hf_fastpath.config import FastpathConfig, WeightFormat
from hf_fastpath.decode_graph import DecodeGraphs
from hf_fastpath.expert_search import quantize_experts
from hf_fastpath.modules import PackedExperts, PackedLinear, W4A16Linear, W8A16Linear
from hf_fastpath.patches.linears import weight_matrix
from hf_fastpath.patches.recipe import Recipe
from hf_fastpath.quantize import quantize_int4, quantize_int8_rows
from hf_fastpath.report import LEFT, FastpathReport, ReportRow, module_bytes
from hf_fastpath.saving import save_packed
from hf_fastpath.tying import Tie, untie

STATE = "_fastpath"
# What a patch sets on the model itself.
INSTALLED = ("_prepare_cache_for_generation", "save_pretrained", STATE)


@dataclasses.dataclass
class PatchState:
    """What a patched model carries, as ``model._fastpath``: enough to undo the patch and to report it."""

    config: FastpathConfig
    recipe: Recipe
    dtype: torch.dtype  # the model's, when it was patched
    attn_implementation: str | None
    replaced: dict[str, nn.Module | None]  # module name -> the original, when kept
    kinds: dict[str, type[nn.Module]]  # module name -> the original's class
    report: FastpathReport
    swapped: dict[str, type[nn.Module]]  # module name -> the class that it had
    unfit: dict[str, str]  # module name -> why it was not swapped, though others of its class are
    reference: str  # why the reference implementations run it on a GPU; "" where they do not
    tie: Tie | None = None  # of a head that is packed now
    graphs: DecodeGraphs | None = None  # of the decode step; None where there are none

    @classmethod
    def new(cls, model: Any, config: FastpathConfig, recipe: Recipe, reference: str = "") -> PatchState:
        """That of a model of which nothing is patched yet."""
        return cls(
            config=config,
            recipe=recipe,
            dtype=model.dtype,
            attn_implementation=model.config._attn_implementation,
            replaced={},
            kinds={},
            report=FastpathReport("", (), ()),
            swapped={},
            unfit={},
            reference=reference,
        )


def replace_linear(model: Any, plan: LinearPlan, state: PatchState, importance: Any) -> None:
    """Quantizes one linear layer, or the experts of one mixture, and puts the packed one in its place.

    importance: what ``layer_energy`` found of its inputs, or None.
    """
    config, original = state.config, model.get_submodule(plan.name)
    if isinstance(plan, ExpertsPlan):
        assert plan.group_size is not None
        assert plan.down_group_size is not None
        quantized = quantize_experts(original, (plan.group_size, plan.down_group_size), config, importance)
        put_packed(model, plan, state, PackedExperts.from_quantized(*quantized))
        return
    weight = weight_matrix(original)
    if plan.bits == 8:
        put_packed(model, plan, state, W8A16Linear.from_quantized(*quantize_int8_rows(weight), original.bias))
        return
    assert plan.group_size is not None
    codes = quantize_int4(
        weight,
        plan.group_size,
        zero_points=config.zero_points,
        search=config.scale_search,
        importance=importance,
    )
    put_packed(model, plan, state, W4A16Linear.from_quantized(codes, original.bias))


def put_packed(model: Any, plan: LinearPlan, state: PatchState, packed: PackedLinear | PackedExperts) -> None:
    """Puts a packed layer in the place of the original one, and notes what it takes to undo that."""
    original = model.get_submodule(plan.name)
    packed.train(original.training)
    if plan.tied:  # the embeddings keep its weight in memory
        kept = original
        state.tie = untie(model, plan.name)
    else:
        kept = original.to("cpu") if state.config.keep_original else None
    model.set_submodule(plan.name, packed)
    state.replaced[plan.name], state.kinds[plan.name] = kept, type(original)


def finish_patch(model: Any, state: PatchState, plans: list[LinearPlan], before: dict[str, int]) -> None:
    """What follows once the linear layers are replaced: the cache, saving, the report."""
    if state.config.kv_cache is not None:
        _install_cache(model, state)
    for name in state.replaced:
        model.get_submodule(name).reference = bool(state.reference)
    if model.device.type == "cuda":  # not in the first step, when memory has been divided up
        for name in state.swapped:
            if hasattr(module := model.get_submodule(name), "prepare"):
                module.prepare()
                if state.config.weights is WeightFormat.W16A16:  # the unmerged weights' memory is of other sizes
                    torch.cuda.empty_cache()
    if state.replaced:
        # functools.partial, not a bound method: those pickle as an attribute of the model, which these are not.
        model.save_pretrained = functools.partial(save_packed, model, state.config)
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()
    state.report = _build_report(model, state, plans, before)
    setattr(model, STATE, state)
    if state.graphs:
        state.graphs.watch(model)


def _install_cache(model: Any, state: PatchState) -> None:
    # In full precision, and with weights=None, the bits are to stay stock's.
    rounds = bool(state.replaced) or state.config.weights is WeightFormat.W16A16
    quantized = state.recipe.quantized_modules if rounds and not state.reference else {}
    classes = {**state.recipe.modules, **quantized}
    single = state.recipe.single_modules if rounds and not state.reference else {}
    for name, module in model.named_modules():
        if fast := single.get(name, classes).get(type(module)):
            if hasattr(fast, "why_not") and (reason := _why_stock_layers(state) or fast.why_not(module)):
                state.unfit[name] = f"{type(module).__name__}, {reason}"
                continue
            state.swapped[name] = type(module)
            module.__class__ = fast
    kv_cache = state.config.kv_cache
    # Else a static one returns plain tensors, which any attention takes.
    if kv_cache is not None and (kv_cache.compressed or generation.static_in_kernel(model, state)):
        model.set_attn_implementation(ATTENTION_NAME)
    model._prepare_cache_for_generation = functools.partial(generation.prepare_default_cache, model)
    model.register_forward_pre_hook(generation.supply_default_cache, with_kwargs=True)
    if not _why_no_graphs(model, state):
        state.graphs = DecodeGraphs()


def _why_stock_layers(state: PatchState) -> str:
    """Why no decoder layer runs as a step of ours; "" when those may that are fit for it."""
    if state.reference:
        return "the reference implementations run the model"
    return "weights=None" if state.config.weights is None else ""


def _why_no_graphs(model: Any, state: PatchState) -> str:
    """Why the decode step of a model is not captured; "" when it is."""
    kv_cache = state.config.kv_cache
    if not state.config.cuda_graphs:
        return "cuda_graphs=False"
    if state.reference:
        return "it runs on the reference implementations"
    if kv_cache is None or not (kv_cache.compressed or generation.static_in_kernel(model, state)):
        return f"the cache is {kv_cache.value if kv_cache else 'not ours'}, and attention transformers' own"
    config = model.config
    if getattr(config, "sliding_window", None) or "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        return "its attention has a sliding window, which transformers' masks make of the length at hand"
    if (rope := _rope_types(config)) & {"dynamic", "longrope"}:
        return f"its rotary embedding ({', '.join(sorted(rope))}) is another one from some length on"
    if not isinstance(model, state.recipe.model_classes) or not state.recipe.capturable:
        return f"{type(model).__name__} is not among the models that were captured in tests"
    return ""


def _rope_types(config: Any) -> set[str]:
    """How positions become angles: one name for all layers, or one for each type of layers."""
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    return {part["rope_type"] for part in parts if "rope_type" in part}


def _build_report(
    model: nn.Module, state: PatchState, plans: list[LinearPlan], before: dict[str, int]
) -> FastpathReport:
    after, planned = module_bytes(model), {plan.name: plan for plan in plans}
    rows = []
    # A wrapper around a layer (LoRA, a parametrization) holds no tensor itself, but was meant to be replaced.
    wrappers = {name: 0 for name in planned if name not in before}
    for name, size in (before | wrappers).items():
        module = model.get_submodule(name)
        if isinstance(module, (PackedLinear, PackedExperts)):
            kind, action, reason = state.kinds[name].__name__, module.layout, ""
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
            + (f"{ATTENTION_NAME} instead of " if model.config._attn_implementation == ATTENTION_NAME else "")
            + str(state.attn_implementation)
        )
    if device.type == "cuda":
        runs = f"Runs on {torch.cuda.get_device_name(device)}"
        if state.reference:
            runs += f" by the slow reference implementations: {state.reference}"
    else:
        parts = ["torch's int4 product"] if state.replaced else []
        parts += (
            [f"{kv_cache.value} attention by its reference implementation"] if kv_cache and kv_cache.compressed else []
        )
        runs = f"Runs on the CPU: {', '.join(parts) or 'as before'}"
    if state.config.weights is WeightFormat.W16A16:
        steps = sum(hasattr(model.get_submodule(name), "prepare") for name in state.swapped)
        how = "in kernels of ours and torch's products" if device.type == "cuda" else "that a GPU would run in kernels"
        runs += f"; weights='w16a16': linear layers as they are, {steps} decoder layers {how}"
    kinds = sorted({kind.__name__ for kind in state.swapped.values()})
    ours = [f"Forward passes of ours: {len(state.swapped)} {', '.join(kinds)}"] if kinds else []
    reasons = collections.Counter(state.unfit.values())
    ours += [f"Forward passes of transformers' own: {count} {reason}" for reason, count in reasons.items()]
    graph: tuple[str, ...] = ()
    if device.type == "cuda" and kv_cache is not None:
        why = _why_no_graphs(model, state)
        graph = ("Decode step of generate(): " + (f"no CUDA graph, since {why}" if why else "a CUDA graph"),)
    originals = "kept in CPU memory" if state.config.keep_original else "freed"
    return (
        cache,
        *ours,
        runs,
        *graph,
        *([f"Original weights of replaced layers: {originals}"] if state.replaced else []),
    )
