"""One declarative recipe a model family."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_fastpath.errors import Unsupported
from hf_fastpath.patches import gpt2, lfm2, lfm2_moe, llama
from hf_fastpath.patches.linears import LINEAR_TYPES, in_and_out
from hf_fastpath.patches.recipe import Block, Recipe

RECIPES: tuple[Recipe, ...] = (llama.RECIPE, lfm2.RECIPE, lfm2_moe.RECIPE, gpt2.RECIPE)


def find_recipe(model: Any) -> Recipe:
    """The recipe for a model: that of its class, or one whose block its decoder layers are built like.

    Raises:
        Unsupported: none fits; the message says what is supported, and what differs.
    """
    for recipe in RECIPES:
        if isinstance(model, recipe.model_classes):
            return recipe
    misfits = []
    for recipe in RECIPES:
        if recipe.block is not None:
            misfit = _misfit(model, recipe, recipe.block)
            if not misfit:
                return recipe
            misfits.append(f"{recipe.family}'s, but {misfit}")
    supported = ", ".join(kind.__name__ for recipe in RECIPES for kind in recipe.model_classes)
    raise Unsupported(
        f"{type(model).__name__} is not a supported model: supported are {supported}, and language models whose "
        f"decoder layers are built like {'; '.join(misfits)}"
    )


def _misfit(model: Any, recipe: Recipe, block: Block) -> str:
    """What keeps a model's decoder layers from having a block's structure; "" if nothing does."""
    if getattr(model.config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    if not hasattr(model, "get_output_embeddings") or not isinstance(model.get_output_embeddings(), nn.Linear):
        return "it has no linear language-model head"
    try:
        layers = model.get_submodule(recipe.decoder_layers)
    except AttributeError:
        return f"it has no {recipe.decoder_layers}"
    for name, layer in layers.named_children():
        if reason := _layer_misfit(layer, recipe, block):
            return f"{recipe.decoder_layers}.{name} {reason}"
    return "" if len(layers) else f"{recipe.decoder_layers} is empty"


def _layer_misfit(layer: nn.Module, recipe: Recipe, block: Block) -> str:
    modules = dict(layer.named_modules())
    holders = [name for name, module in modules.items() if any(True for _ in module.parameters(recurse=False))]
    head_norms = tuple(name for name in block.head_norms if name in modules)
    required = (*recipe.linears, *block.norms, *(block.head_norms if head_norms else ()))
    if missing := [name for name in required if name not in modules]:
        return f"has no {missing[0]}"
    if foreign := [name for name in holders if name not in required]:
        return f"holds weights in {foreign[0] or type(layer).__name__}"
    if odd := [name for name in recipe.linears if not isinstance(modules[name], LINEAR_TYPES)]:
        return f"has a {type(modules[odd[0]]).__name__} as {odd[0]}"
    return _shape_misfit(modules, recipe, block, head_norms)


def _shape_misfit(modules: dict[str, Any], recipe: Recipe, block: Block, head_norms: tuple[str, ...]) -> str:
    """What keeps the sizes from being those of ``o(attention(q, k, v))`` and ``down(act(gate) * up)``: a projection
    that also makes something else, such as a gate, is larger."""
    (q_in, q_out), (_, k_out), (_, v_out), (o_in, o_out) = (in_and_out(modules[name]) for name in recipe.linears[:4])
    (gate_in, gate_out), (_, up_out), (down_in, down_out) = (in_and_out(modules[name]) for name in recipe.linears[4:])
    if not (q_out == o_in and k_out == v_out and q_in == o_out == gate_in == down_out):
        return f"has attention projections of other shapes ({q_in} to {q_out}, {k_out}, {v_out}; {o_in} to {o_out})"
    if not gate_out == up_out == down_in:
        return f"has a feed-forward of other shapes ({gate_out}, {up_out}; {down_in})"
    for name in (*block.norms, *head_norms):
        shapes = {key: tuple(value.shape) for key, value in modules[name].named_parameters()}
        size = q_in if name in block.norms else shapes.get("weight", (0,))[0]
        if shapes != {"weight": (size,)} or (k_out % size and name in head_norms):
            return f"has a {type(modules[name]).__name__} as {name} with weights {shapes}"
    return ""
