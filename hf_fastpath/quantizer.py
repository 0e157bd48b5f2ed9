"""The transformers plugin: ``from_pretrained(..., quantization_config=FastpathConfig())`` and packed checkpoints.

A float checkpoint is quantized while it is loaded: as soon as all tensors of a decoder layer are there, the layer runs
on random tokens (activations.py) and its linear layers are packed, so at most one layer is in memory unpacked. A packed
checkpoint is loaded into empty packed layers. Either way the model ends up as ``patch_model`` would have made it.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    AutoHfQuantizer,
)

from hf_fastpath.checkpoints import CheckpointFormat, detect_format
from hf_fastpath.checks import ExpertsPlan, LinearPlan, check_target, choose_reference, expert_names, plan_linears
from hf_fastpath.config import QUANT_METHOD, FastpathConfig, ScaleSearch
from hf_fastpath.errors import Unsupported
from hf_fastpath.loading import LayerStream, place_converted
from hf_fastpath.modules import PackedExperts
from hf_fastpath.packing import GROUP_SIZES
from hf_fastpath.patches import find_recipe
from hf_fastpath.patches.linears import LINEAR_TYPES, in_and_out
from hf_fastpath.report import module_bytes
from hf_fastpath.saving import EXPERTS, INT4, FastpathQuantizationConfig, empty_packed
from hf_fastpath.steps import PatchState, finish_patch

# Fields of a FastpathConfig that say how a packed model runs, not how it was packed.
_RUNNING = ("kv_cache", "kv_budget", "kv_window", "kv_sinks", "progress")
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
        self.source = detect_format(quantization_config.source) if quantization_config.source else None
        self.stream: LayerStream | None = None
        self.error: Exception | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """
        Raises:
            Unsupported: the model is to be spread over devices or to disk.
        """
        self.device = _one_device(device_map)

    def update_device_map(self, device_map: Any) -> dict[str, torch.device] | None:
        return None if device_map is None else {"": self.device}

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config, self.before = self.settings.with_search(ScaleSearch.ACTIVATION), _bytes_once_tied(model)
        if self.source is None and self.description.packed is None and config.scale_search is ScaleSearch.OUTPUT:
            raise Unsupported(
                "scale_search='output' runs the whole model, which is not there while it is quantized layer by layer: "
                "use 'auto' here, or load the model as it is and call patch_model"
            )
        recipe = find_recipe(model)
        check_target(model, config, self.device)
        self.state = PatchState.new(model, config, recipe)
        packed = self.description.packed
        if self.source is not None and expert_names(model, recipe):
            raise Unsupported(
                f"the experts of a mixture are not converted from {self.source.METHOD} checkpoints: load the float "
                f"checkpoint of this {type(model).__name__} and quantize it here"
            )
        if self.source is not None:
            self.plans = self._place_empty_layers(model, _source_layers(model, self.source))
        elif packed is not None:
            self.plans = self._place_empty_layers(model, {name: group for group in packed for name in group["modules"]})
        else:
            self.plans = plan_linears(model, recipe, config)
            self.stream = LayerStream(model, self.state, self.plans)
        _keep_from_initializing(model, [*self.state.replaced, *(plan.name for plan in self.plans if plan.bits)])
        self.state.reference = choose_reference(model, config, self.device)

    def _place_empty_layers(self, model: Any, layers: dict[str, dict[str, Any]]) -> list[LinearPlan]:
        mixtures, reason = expert_names(model, self.state.recipe), "not packed in the checkpoint"
        for name, layout in layers.items():
            original = _experts_at(model, name, mixtures) if layout["format"] == EXPERTS else _linear_at(model, name)
            model.set_submodule(name, _empty_like(original, layout, model.dtype))
            self.state.replaced[name], self.state.kinds[name] = None, type(original)
        linears = [name for name, module in model.named_modules() if isinstance(module, LINEAR_TYPES)]
        left = [ExpertsPlan(name, reason) for name in mixtures if name not in layers]
        return [*(LinearPlan(name, reason) for name in linears), *left]

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a tensor passes through :class:`LayerStream`: all tensors of the decoder layers do."""
        return self.stream is not None and self.stream.takes(param_name)

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        packed = self.stream is not None and param_name in self.stream.weights
        return _INT4_BYTES if packed else param.element_size()

    def get_quantize_ops(self) -> ConversionOps:
        return _StreamOp(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """For another tool's checkpoint: all tensors of a layer go to one operation."""
        if self.source is None:
            return []
        sources = [rf"\.{suffix}$" for suffix in self.source.suffixes]
        return [WeightConverter(sources, [".qweight"], [_ConvertOp(self, self.source)])]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.error is not None:
            raise self.error
        if self.stream is not None:
            self.stream.finish()
        else:
            _check_loaded(model, self.state.replaced)
        # The conversion of another tool's tensors is not to be reverted when ours are saved.
        used = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [
            conversion
            for conversion in used
            if not any(isinstance(operation, _ConvertOp) for operation in getattr(conversion, "operations", ()))
        ]
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


def _bytes_once_tied(model: Any) -> dict[str, int]:
    """Bytes of each module's tensors in a model that is not loaded yet, and whose tied tensors are still two."""
    sizes = module_bytes(model)
    for target, source in model.all_tied_weights_keys.items():
        tensor = model.get_parameter_or_buffer(target)
        if tensor is not model.get_parameter_or_buffer(source):
            sizes[target.rpartition(".")[0]] -= tensor.nbytes
    return sizes


def _source_layers(model: nn.Module, source: CheckpointFormat) -> dict[str, dict[str, Any]]:
    """The layers that another tool's checkpoint holds as int4. Their real layout is known once they are converted."""
    linears = [name for name, module in model.named_modules() if isinstance(module, LINEAR_TYPES)]
    layout = {"format": INT4, "group_size": GROUP_SIZES[-1], "zeros": False}
    layers = {name: layout for name in linears if source.quantizes(name)}
    if not layers:
        raise Unsupported(f"the {source.METHOD} checkpoint quantizes no linear layer of {type(model).__name__}")
    return layers


def _keep_from_initializing(model: nn.Module, names: Iterable[str]) -> None:
    """Marks what holds the layers ``names``: GPT-2 initializes its layers' weights, which are no more, by name."""
    for name in names:
        parent = model.get_submodule(name.rpartition(".")[0])
        if not parent._parameters and not parent._buffers:
            parent._is_hf_initialized = True  # type: ignore[assignment]


def _empty_like(original: Any, layout: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    if layout["format"] != EXPERTS:
        return empty_packed(layout, *in_and_out(original), bias=original.bias is not None, dtype=dtype)
    count, hidden, intermediate = original.down_proj.shape
    sizes, zeros = layout["group_sizes"], layout["zeros"]
    return PackedExperts.empty(count, hidden, intermediate, sizes, zeros=zeros, dtype=dtype)


def _experts_at(model: nn.Module, name: str, mixtures: Iterable[str]) -> nn.Module:
    if name not in mixtures:
        raise Unsupported(f"the checkpoint holds packed experts {name}, which {type(model).__name__} does not have")
    return model.get_submodule(name)


def _linear_at(model: nn.Module, name: str) -> nn.Module:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, LINEAR_TYPES):
        raise Unsupported(f"the checkpoint holds a packed {name}, which is no linear layer of {type(model).__name__}")
    return module


def _check_loaded(model: nn.Module, names: Iterable[str]) -> None:
    """Raises when a packed tensor was not in the checkpoint; transformers puts arbitrary memory there, and warns."""
    for name in names:
        for tensor_name, tensor in model.get_submodule(name).named_buffers():
            if not getattr(tensor, "_is_hf_initialized", False):
                raise Unsupported(f"the checkpoint has no {name}.{tensor_name}: it is damaged, or of another model")


class _LoadOp(ConversionOps):
    """An operation that puts what it is handed in place itself, and leaves nothing for transformers to set.

    transformers notes an exception in a long report and goes on; here the first one ends the work, and is raised as it
    is once transformers returns.
    """

    def __init__(self, hf_quantizer: FastpathHfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer  # its presence keeps transformers from casting what it hands over

    def __deepcopy__(self, memo: dict[int, Any]) -> _LoadOp:
        return self  # transformers copies operations for every layer; all of them are to feed one model

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        layer = kwargs["full_layer_name"].rpartition(".")[0]
        if self.hf_quantizer.error is None:
            try:
                self.place(kwargs["model"], layer, input_dict)
            except Exception as error:
                self.hf_quantizer.error = error
        arrived = {name for name in kwargs["missing_keys"] if self.fills(name, layer, input_dict)}
        kwargs["missing_keys"] -= arrived
        return {}

    @abstractmethod
    def place(self, model: Any, layer: str, tensors: dict[str, Any]) -> None:
        """Puts ``tensors``, by the names or patterns that transformers collects them under, into ``layer``."""

    @abstractmethod
    def fills(self, name: str, layer: str, tensors: dict[str, Any]) -> bool:
        """Whether the model's tensor ``name`` is there once ``tensors`` are in place."""


class _StreamOp(_LoadOp):
    """Takes the float tensors of the decoder layers."""

    def place(self, model: Any, layer: str, tensors: dict[str, Any]) -> None:
        stream = self.hf_quantizer.stream
        assert stream is not None
        for name, value in tensors.items():
            stream.arrive(name, value[0] if isinstance(value, list) else value)

    def fills(self, name: str, layer: str, tensors: dict[str, Any]) -> bool:
        return name in tensors


class _ConvertOp(_LoadOp):
    """Takes the tensors of one layer of another tool's checkpoint."""

    def __init__(self, hf_quantizer: FastpathHfQuantizer, source: CheckpointFormat) -> None:
        super().__init__(hf_quantizer)
        self.source = source

    def place(self, model: Any, layer: str, tensors: dict[str, Any]) -> None:
        suffixes = {rf"\.{suffix}$": suffix for suffix in self.source.suffixes}
        named = {f"{layer}.{suffixes[pattern]}": value[0] for pattern, value in tensors.items()}
        quantized, order = self.source.convert(layer, named)
        place_converted(model, layer, quantized, order)

    def fills(self, name: str, layer: str, tensors: dict[str, Any]) -> bool:
        return name.rpartition(".")[0] == layer and not name.endswith(".bias")


def register_quantizer() -> None:
    """Makes ``quant_method: fastpath`` known to transformers. Idempotent."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = FastpathQuantizationConfig
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = FastpathHfQuantizer
    _wrap_merge()


def _wrap_merge() -> None:
    """Lets a FastpathConfig be passed for a checkpoint that is quantized already.

    For our own it replaces what concerns running it, the cache and the progress bar; GPTQ, AWQ and compressed-tensors
    checkpoints are converted. transformers would only say that the configurations are of different classes.
    """
    stock = AutoHfQuantizer.merge_quantization_configs
    if hasattr(stock, "_fastpath_wraps"):
        return

    def merge(cls: Any, quantization_config: Any, quantization_config_from_args: Any) -> Any:
        passed = quantization_config_from_args
        if not isinstance(passed, FastpathConfig):
            return stock(quantization_config, passed)
        found = quantization_config if isinstance(quantization_config, dict) else quantization_config.to_dict()
        if found.get("quant_method") != QUANT_METHOD:
            return FastpathQuantizationConfig(passed, source=found)
        saved = FastpathQuantizationConfig.from_dict(found)
        saved.config = dataclasses.replace(saved.config, **{name: getattr(passed, name) for name in _RUNNING})
        return saved

    merge._fastpath_wraps = stock  # type: ignore[attr-defined]
    AutoHfQuantizer.merge_quantization_configs = classmethod(merge)  # type: ignore[method-assign,assignment]
