"""The transformers plugin: ``from_pretrained(..., quantization_config=FastpathConfig())`` and packed checkpoints.

A float checkpoint is quantized while it is loaded: as soon as all tensors of a decoder layer are there, the layer runs
on random tokens (activations.py) and its linear layers are packed, so at most one layer is in memory unpacked. A packed
checkpoint is loaded into empty packed layers. Either way the model ends up as ``patch_model`` would have made it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    AutoHfQuantizer,
)

from hf_fastpath.activations import LayerWalk
from hf_fastpath.checks import LinearPlan, check_target, needs_kernels, plan_linears
from hf_fastpath.config import QUANT_METHOD, FastpathConfig, ScaleSearch
from hf_fastpath.errors import Unsupported
from hf_fastpath.modules import W4A16Linear
from hf_fastpath.patches import find_recipe
from hf_fastpath.report import module_bytes
from hf_fastpath.runtime import require_device
from hf_fastpath.saving import FastpathQuantizationConfig
from hf_fastpath.steps import PatchState, finish_patch, replace_linear

_INT4_BYTES = 0.55  # of a weight, scales and zero points included: what transformers reserves on the GPU beforehand


class FastpathHfQuantizer(HfQuantizer):
    """Made by transformers, one for each ``from_pretrained``."""

    def __init__(self, quantization_config: FastpathConfig | FastpathQuantizationConfig, **kwargs: Any) -> None:
        if isinstance(quantization_config, FastpathConfig):
            quantization_config = FastpathQuantizationConfig(quantization_config)
        super().__init__(quantization_config, **kwargs)
        self.description = quantization_config
        self.settings = quantization_config.config
        self.device = torch.device("cpu")
        self.stream: LayerStream | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """
        Raises:
            Unsupported: the model is to be spread over devices or to disk.
        """
        self.device = _one_device(device_map)

    def update_device_map(self, device_map: Any) -> dict[str, torch.device] | None:
        return None if device_map is None else {"": self.device}

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config, self.before = self.settings, module_bytes(model)
        self.state = PatchState.new(model, config, find_recipe(model))
        check_target(model, config, self.device)
        self.plans = plan_linears(model, self.state.recipe, config)
        if needs_kernels(config):
            require_device(self.device)
        packed = self.description.packed
        if packed is None:
            self.stream = LayerStream(model, self.state, self.plans)
        else:
            self._empty_layers(model, packed)

    def _empty_layers(self, model: Any, packed: list[dict[str, Any]]) -> None:
        for group in packed:
            for name in group["modules"]:
                linear = _linear_at(model, name)
                empty = W4A16Linear.empty(
                    linear.in_features,
                    linear.out_features,
                    group["group_size"],
                    zeros=group["zeros"],
                    bias=linear.bias is not None,
                    input_order=group["input_order"],
                    dtype=model.dtype,
                )
                model.set_submodule(name, empty)
                self.state.replaced[name] = None

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a tensor passes through :class:`LayerStream`: all tensors of the decoder layers do."""
        return self.stream is not None and self.stream.takes(param_name)

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        packed = self.stream is not None and param_name in self.stream.weights
        return _INT4_BYTES if packed else param.element_size()

    def get_quantize_ops(self) -> ConversionOps:
        assert self.stream is not None
        return _StreamOp(self.stream)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.stream is not None:
            self.stream.finish()
        finish_patch(model, self.state, self.plans, self.before)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _one_device(device_map: Any) -> torch.device:
    """The device that a ``device_map`` names; "auto" and its kin mean the current GPU, or the CPU without one."""
    if device_map is None:
        return torch.device("cpu")
    if isinstance(device_map, str) and device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    if len(devices) != 1 or "disk" in devices:
        raise Unsupported(f"device_map={device_map!r}: hf_fastpath loads a model onto one device, such as 'cuda:0'")
    (device,) = devices
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def _linear_at(model: nn.Module, name: str) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        raise Unsupported(f"the checkpoint holds a packed {name}, which is no linear layer of {type(model).__name__}")
    return module


class LayerStream:
    """Packs a model's linear layers while its tensors arrive, decoder layer by decoder layer.

    transformers hands over the tensors in the order of their names, the embeddings before the layers in every family so
    far; where they come later, the layers wait for the end.
    """

    def __init__(self, model: Any, state: PatchState, plans: list[LinearPlan]) -> None:
        self.model, self.state = model, state
        self.plans = {plan.name: plan for plan in plans if plan.group_size is not None}
        self.weights = {f"{name}.weight" for name in self.plans}
        self.prefix = f"{state.recipe.decoder_layers}."
        self.missing: list[set[str]] = [set() for _ in model.get_submodule(state.recipe.decoder_layers)]
        for name in model.state_dict():
            if name.startswith(self.prefix):
                self.missing[self._layer_of(name)].add(name)
        measured = state.config.scale_search is ScaleSearch.ACTIVATION and self.plans
        self.walk = LayerWalk(model, state.recipe.decoder_layers) if measured else None
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
        if attribute not in module._buffers:
            tensor = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers would initialize it once more
        setattr(module, attribute, tensor)
        self.missing[self._layer_of(name)].discard(name)
        self._pack_complete_layers()

    def finish(self) -> None:
        """Packs what is left, once everything is loaded (a tensor that the checkpoint lacks is initialized by now)."""
        for names in self.missing:
            names.clear()
        self._pack_complete_layers()

    def _pack_complete_layers(self) -> None:
        if self.model.get_input_embeddings().weight.is_meta:
            return
        while self.done < len(self.missing) and not self.missing[self.done]:
            prefix = f"{self.prefix}{self.done}."
            names = [name for name in self.plans if name.startswith(prefix)]
            energy: dict[str, torch.Tensor] = {}
            if self.walk is not None:
                _materialize_buffers(self.model)
                energy = self.walk.run_layer(self.done, names)
            for name in names:
                replace_linear(self.model, self.plans[name], self.state, energy.get(name))
            self.done += 1


class _StreamOp(ConversionOps):
    """What transformers calls with each tensor of a decoder layer; leaves nothing for it to set."""

    def __init__(self, stream: LayerStream) -> None:
        self.stream = stream

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        for name, value in input_dict.items():
            kwargs["missing_keys"].discard(name)
            self.stream.arrive(name, value[0] if isinstance(value, list) else value)
        return {}


def _materialize_buffers(model: Any) -> None:
    """Computes the buffers that no checkpoint holds (rotary frequencies), which transformers does only at the end."""
    device = model.get_input_embeddings().weight.device
    for module in model.modules():
        meta = [name for name in module._non_persistent_buffers_set if _is_meta(module._buffers[name])]
        if meta:
            with device:
                fresh = type(module)(config=model.config)
            for name in meta:
                module._buffers[name] = fresh._buffers[name].to(device)


def _is_meta(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and tensor.is_meta


def register_quantizer() -> None:
    """Makes ``quant_method: fastpath`` known to transformers. Idempotent."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = FastpathQuantizationConfig
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = FastpathHfQuantizer
    _wrap_merge()


def _wrap_merge() -> None:
    """A FastpathConfig passed for a packed checkpoint replaces what concerns running it: cache and progress bar.

    transformers would only say that the two configurations are of different classes.
    """
    stock = AutoHfQuantizer.merge_quantization_configs
    if hasattr(stock, "_fastpath_wraps"):
        return

    def merge(cls: Any, quantization_config: Any, quantization_config_from_args: Any) -> Any:
        ours = isinstance(quantization_config, dict) and quantization_config.get("quant_method") == QUANT_METHOD
        if not (ours and isinstance(quantization_config_from_args, FastpathConfig)):
            return stock(quantization_config, quantization_config_from_args)
        saved = FastpathQuantizationConfig.from_dict(quantization_config)
        passed = quantization_config_from_args
        changes = {"kv_cache": passed.kv_cache, "progress": passed.progress}
        saved.config = FastpathConfig.build(saved.config, changes)
        return saved

    merge._fastpath_wraps = stock  # type: ignore[attr-defined]
    AutoHfQuantizer.merge_quantization_configs = classmethod(merge)  # type: ignore[method-assign,assignment]
