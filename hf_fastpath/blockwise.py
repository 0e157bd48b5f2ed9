"""Walking a model block by block: what each linear layer reads when all before it are already int4."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_fastpath.checks import ExpertsPlan, LinearPlan
from hf_fastpath.config import FastpathConfig
from hf_fastpath.error_feedback import quantize_with_feedback
from hf_fastpath.expert_search import quantize_experts, watching_experts
from hf_fastpath.layer_walk import LayerWalk, watching_inputs
from hf_fastpath.patches.linears import weight_matrix
from hf_fastpath.patches.recipe import Recipe
from hf_fastpath.precision import tensor_float32
from hf_fastpath.quantize import GroupQuantized

_BATCH = 8  # sequences in one forward pass


@torch.no_grad()
def quantize_blockwise(
    model: Any, recipe: Recipe, plans: list[LinearPlan], config: FastpathConfig, tokens: torch.Tensor
) -> Iterator[tuple[LinearPlan, Any]]:
    """Quantizes the layers of ``plans`` in the order of the blocks, then the language-model head if it is among them.

    Yields a :class:`GroupQuantized` for each linear layer, and for the experts of a mixture what
    :func:`quantize_experts` returns.

    The caller puts each quantized layer in before it asks for the next one: the block is then run with it, and what
    it puts out is what the next block is measured on. So errors of earlier blocks are seen by later ones.

    Holds, besides the model: the hidden states of all tokens, of one block the second moments of its layers' inputs
    (``K x K`` float32 each), and of the layers that share an input their weights once more and a float32 copy.

    Args:
        tokens: int64 ``(n, T)``.

    Raises:
        ValueError: a layer's inputs are not finite.
    """
    bar = tqdm(total=len(plans), desc="Quantizing to int4", unit="layer", disable=not config.progress)
    walk = LayerWalk(model, recipe.decoder_layers, tokens, _BATCH)
    with bar:
        for index in range(len(walk.layers)):
            prefix = f"{recipe.decoder_layers}.{index}."
            mixtures = [plan for plan in plans if isinstance(plan, ExpertsPlan) and plan.name.startswith(prefix)]
            inside = [plan for plan in plans if plan.name.startswith(prefix) and plan not in mixtures]
            for members, moment in _moments(walk, index, [plan.name for plan in inside]):
                chosen = [plan for plan in inside if plan.name in members]
                for plan, quantized in _quantize_together(model, chosen, moment, config):
                    yield plan, quantized
                    bar.update()
            for mixture in mixtures:
                yield mixture, _quantize_mixture(walk, index, mixture, config)
                bar.update()
            walk.run_layer(index)
        outside = [plan for plan in plans if not plan.name.startswith(f"{recipe.decoder_layers}.")]
        for plan in outside:
            yield from _quantize_together(model, [plan], _head_moment(walk, plan.name), config)
            bar.update()


def _quantize_mixture(walk: LayerWalk, index: int, plan: ExpertsPlan, config: FastpathConfig) -> Any:
    """By the inputs that the block's packed attention brings its experts."""
    with watching_experts(walk.model, [plan.name]) as calls:
        for _ in walk.outputs(index):
            pass
    assert plan.group_size is not None
    assert plan.down_group_size is not None
    groups = (plan.group_size, plan.down_group_size)
    return quantize_experts(walk.model.get_submodule(plan.name), groups, config, calls[plan.name])


def _moments(walk: LayerWalk, index: int, names: list[str]) -> Iterator[tuple[list[str], torch.Tensor]]:
    """``E[x x^T]`` for each input of the linear layers ``names``, with the names of those that read it."""
    sums: dict[str, torch.Tensor] = {}  # by the first layer that reads an input
    readers: dict[str, list[str]] = {}
    seen: list[tuple[torch.Tensor, str]] = []

    def see(name: str, x: torch.Tensor) -> None:
        for other, first in seen:
            if other is x:
                if name not in readers[first]:
                    readers[first].append(name)
                return
        seen.append((x, name))
        readers.setdefault(name, [name])
        _add_moment(sums, name, x)

    with watching_inputs(walk.model, names, see):
        for _ in walk.outputs(index) if names else ():
            seen.clear()
    for name in sorted(sums, key=lambda name: -len(sums[name])):  # a wide one's moment is the most memory
        yield readers[name], _checked(name, sums.pop(name).div_(walk.tokens.numel()))


def _add_moment(sums: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> None:
    """Adds the outer products of the rows of ``x`` ``(..., K)`` to ``sums[name]`` ``(K, K)``."""
    rows = x.reshape(-1, x.shape[-1]).float()
    if name not in sums:
        sums[name] = rows.new_zeros((rows.shape[1], rows.shape[1]))
    with tensor_float32():
        sums[name].addmm_(rows.t(), rows)


def _head_moment(walk: LayerWalk, name: str) -> torch.Tensor:
    """``E[x x^T]`` of what the language-model head ``name`` reads, the blocks being as they are now."""
    sums: dict[str, torch.Tensor] = {}
    for x in walk.head_inputs():
        _add_moment(sums, name, x)
    return _checked(name, sums[name].div_(walk.tokens.numel()))


def _checked(name: str, moment: torch.Tensor) -> torch.Tensor:
    if not bool(moment.isfinite().all()):
        raise ValueError(
            f"{name}: its inputs are not finite on the calibration text; "
            "scale_search='mse' does not look at activations"
        )
    return moment


def _quantize_together(
    model: nn.Module, plans: list[LinearPlan], moment: torch.Tensor, config: FastpathConfig
) -> Iterator[tuple[LinearPlan, GroupQuantized]]:
    """Layers with one input as one weight: the work goes column by column, and a column of three is as fast as one."""
    weights = [weight_matrix(model.get_submodule(plan.name)) for plan in plans]
    sizes = [weight.shape[0] for weight in weights]
    group_size = plans[0].group_size
    assert group_size is not None
    stacked = torch.cat(weights) if len(weights) > 1 else weights[0]
    del weights  # the caller frees them one by one
    together = quantize_with_feedback(stacked, moment, group_size, zero_points=config.zero_points)
    del stacked
    start = 0
    for plan, size in zip(plans, sizes, strict=True):
        yield plan, together.rows(slice(start, start + size))
        start += size
