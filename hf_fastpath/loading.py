"""What is done to a model's linear layers while their tensors are being loaded."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from hf_fastpath.activations import head_energy, layer_energy, random_walk
from hf_fastpath.checks import ExpertsPlan, LinearPlan, packed_weights
from hf_fastpath.config import ScaleSearch
from hf_fastpath.modules import W4A16Linear
from hf_fastpath.quantize import GroupQuantized
from hf_fastpath.steps import PatchState, replace_linear


class LayerStream:
    """Packs a model's linear layers while its tensors arrive, decoder layer by decoder layer.

    transformers hands over the tensors in the order of their names, the embeddings before the layers in every family so
    far; where they come later, the layers wait for the end.
    """

    def __init__(self, model: Any, state: PatchState, plans: list[LinearPlan]) -> None:
        self.model, self.state = model, state
        self.plans = {plan.name: plan for plan in plans if plan.bits is not None}
        self.weights = {name for plan in self.plans.values() for name in packed_weights(plan)}
        self.prefix = f"{state.recipe.decoder_layers}."
        self.missing: list[set[str]] = [set() for _ in model.get_submodule(state.recipe.decoder_layers)]
        for name in model.state_dict():
            if name.startswith(self.prefix):
                self.missing[self._layer_of(name)].add(name)
        int4 = any(plan.bits == 4 for plan in self.plans.values())  # int8 asks for no activations
        measured = int4 and state.config.scale_search is ScaleSearch.ACTIVATION
        self.walk = random_walk(model, state.recipe.decoder_layers) if measured else None
        self.done = 0

    def _layer_of(self, name: str) -> int:
        return int(name.removeprefix(self.prefix).split(".")[0])

    def takes(self, name: str) -> bool:
        return name.startswith(self.prefix) and name.removeprefix(self.prefix).split(".")[0].isdigit()

    def arrive(self, name: str, tensor: torch.Tensor) -> None:
        """Puts a float tensor in its place, then packs every layer that is complete.

        Raises:
            ValueError: its shape is not the model's, or a weight holds NaN or infinity.
        """
        path, _, attribute = name.rpartition(".")
        module = self.model.get_submodule(path)
        wanted = getattr(module, attribute)
        if wanted.shape != tensor.shape:
            raise ValueError(f"{name}: the checkpoint has shape {tuple(tensor.shape)}, the model {tuple(wanted.shape)}")
        if name in self.weights and not bool(tensor.isfinite().all()):
            name = name.removesuffix(".weight")
            raise ValueError(f"{name}: the weight holds NaN or infinity, which int4 cannot store")
        if attribute in module._buffers:
            tensor = tensor.to(wanted.dtype)  # a router's bias is float32 in a model of any dtype
        else:
            tensor = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        _mark_initialized(tensor)
        setattr(module, attribute, tensor)
        self.missing[self._layer_of(name)].discard(name)
        self._pack_complete_layers()

    def finish(self) -> None:
        """Packs what is left, once everything is loaded (a tensor that the checkpoint lacks is initialized by now)."""
        for names in self.missing:
            names.clear()
        self._pack_complete_layers()
        embeddings = self.model.get_input_embeddings().weight
        for name, plan in self.plans.items():
            if not name.startswith(self.prefix):  # the head; transformers tied it only once all was loaded
                plan = dataclasses.replace(plan, tied=self.model.get_submodule(name).weight is embeddings)
                energy = head_energy(self.walk) if self.walk and plan.bits == 4 else None
                replace_linear(self.model, plan, self.state, energy)

    def _pack_complete_layers(self) -> None:
        if self.model.get_input_embeddings().weight.is_meta:
            return
        while self.done < len(self.missing) and not self.missing[self.done]:
            prefix = f"{self.prefix}{self.done}."
            names = [name for name in self.plans if name.startswith(prefix)]
            experts = [name for name in names if isinstance(self.plans[name], ExpertsPlan)]
            energy: dict[str, Any] = {}
            if self.walk is not None:
                _materialize_buffers(self.model)
                linears = [name for name in names if name not in experts]
                energy = layer_energy(self.walk, self.done, linears, experts)
            for name in names:
                replace_linear(self.model, self.plans[name], self.state, energy.get(name))
            self.done += 1


def _materialize_buffers(model: Any) -> None:
    """Computes the buffers that no checkpoint holds (rotary frequencies), which transformers does only at the end."""
    device = model.get_input_embeddings().weight.device
    for module in model.modules():
        meta = [name for name in module._non_persistent_buffers_set if _is_meta(module._buffers[name])]
        for name in meta:
            module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
        if meta:
            with torch.no_grad():
                model._init_weights(module)  # leaves alone what is loaded


def _is_meta(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and tensor.is_meta


def place_converted(model: Any, name: str, quantized: GroupQuantized, input_order: torch.Tensor | None) -> None:
    """Puts the weight of another tool's checkpoint in place of the empty packed layer ``name``, keeping its bias.

    Scales are in the model's dtype afterwards, in which the products run.

    Raises:
        ValueError: the shape is not the model's.
    """
    empty = model.get_submodule(name)
    shape, wanted = tuple(quantized.q.shape), (empty.out_features, empty.in_features)
    if shape != wanted:
        raise ValueError(f"{name}: the checkpoint has shape {shape}, the model {wanted}")
    quantized = dataclasses.replace(quantized, scale=quantized.scale.to(model.dtype))
    packed = W4A16Linear.from_quantized(quantized, None, input_order)
    for tensor in packed.buffers():
        _mark_initialized(tensor)
    packed.bias = empty.bias
    model.set_submodule(name, packed.train(empty.training))


def _mark_initialized(tensor: torch.Tensor) -> None:
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers would initialize it once more
