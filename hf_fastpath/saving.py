"""Packed checkpoints: what ``save_pretrained`` of a patched model writes, and how config.json describes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

import hf_fastpath
from hf_fastpath.config import QUANT_METHOD, FastpathConfig
from hf_fastpath.errors import Unsupported
from hf_fastpath.modules import PackedExperts, PackedLinear, W4A16Linear, W8A16Linear

INT4, INT8, EXPERTS = "int4", "int8", "int4 experts"
_ABSENT = object()


class FastpathQuantizationConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a packed checkpoint's config.json.

    Attributes:
        config: the :class:`FastpathConfig` that it was patched with.
        packed: groups of packed layers, each a dict: ``format`` ("int4", "int8" or "int4 experts"), ``modules`` (their
            names), for int4 ``group_size``, ``zeros`` (whether it has zero points) and ``input_order`` (whether its
            columns are permuted), for experts ``group_sizes`` (of gate and up, and of down) and ``zeros``. None: a
            checkpoint that is not packed yet.
        source: the ``quantization_config`` of a GPTQ, AWQ or compressed-tensors checkpoint that is being converted.
    """

    def __init__(
        self,
        config: FastpathConfig,
        packed: list[dict[str, Any]] | None = None,
        source: dict[str, Any] | None = None,
    ) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # transformers' enum knows only its own methods
        self.config, self.packed, self.source = config, packed, source

    def to_dict(self) -> dict[str, Any]:
        plain = {"quant_method": QUANT_METHOD, "hf_fastpath_version": hf_fastpath.__version__}
        return plain | {"config": self.config.to_dict(), "packed": self.packed}

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> FastpathQuantizationConfig:
        """
        Raises:
            Unsupported: written by a later version of hf_fastpath, or damaged.
        """
        version = config_dict.get("hf_fastpath_version", "unknown")
        try:
            config = FastpathConfig(**config_dict["config"])
            packed = [dict(group) for group in config_dict["packed"]]
            names = [name for group in packed for name in group["modules"] if group["format"] in (INT4, INT8, EXPERTS)]
            complete = len(names) == sum(len(group["modules"]) for group in packed)
        except (KeyError, TypeError, ValueError) as error:
            raise Unsupported(_unreadable(version) + f": {error!r}") from None
        if not complete:
            formats = sorted({str(group["format"]) for group in packed})
            raise Unsupported(_unreadable(version) + f": weight formats {formats}")
        result = cls(config, packed)
        return (result, kwargs) if return_unused_kwargs else result  # type: ignore[return-value]


def empty_packed(
    group: dict[str, Any], in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype
) -> PackedLinear:
    """A layer of a packed group, on the meta device, for a checkpoint to be loaded into."""
    if group["format"] == INT8:
        return W8A16Linear.empty(in_features, out_features, bias=bias, dtype=dtype)
    layout = {name: group[name] for name in ("group_size", "zeros", "input_order") if name in group}
    return W4A16Linear.empty(in_features, out_features, **layout, bias=bias, dtype=dtype)


def _unreadable(version: str) -> str:
    return (
        f"this checkpoint's quantization_config was written by hf_fastpath {version} and cannot be read by "
        f"{hf_fastpath.__version__}"
    )


def describe_packed(model: nn.Module) -> list[dict[str, Any]]:
    """The ``packed`` groups of a model's layers."""
    groups: list[dict[str, Any]] = []
    for name, module in model.named_modules():
        if not isinstance(module, (PackedLinear, PackedExperts)):
            continue
        layout = _layout_of(module)
        group = next((known for known in groups if known | layout == known), None)
        if group is None:
            groups.append(group := layout | {"modules": []})
        group["modules"].append(name)
    return groups


def _layout_of(module: PackedLinear | PackedExperts) -> dict[str, Any]:
    if isinstance(module, PackedExperts):
        sizes = [module.gate_up.group_size, module.down.group_size]
        return {"format": EXPERTS, "group_sizes": sizes, "zeros": module.gate_up.zeros is not None}
    if not isinstance(module, W4A16Linear):
        return {"format": INT8}
    flags = {"zeros": module.zeros is not None, "input_order": module.input_order is not None}
    return {"format": INT4, "group_size": module.group_size, **flags}


def save_packed(model: Any, config: FastpathConfig, *args: Any, **kwargs: Any) -> Any:
    """``save_pretrained`` of a patched model: the packed weights in safetensors, and a config.json that
    ``from_pretrained`` reads back once hf_fastpath is registered. Takes what ``save_pretrained`` takes."""
    with _described(model, FastpathQuantizationConfig(config, describe_packed(model))):
        return type(model).save_pretrained(model, *args, **kwargs)


@contextmanager
def _described(model: Any, description: FastpathQuantizationConfig) -> Iterator[None]:
    before = getattr(model.config, "quantization_config", _ABSENT)
    model.config.quantization_config = description
    try:
        yield
    finally:
        if before is _ABSENT:
            del model.config.quantization_config
        else:
            model.config.quantization_config = before


def forget_quantization(model: Any) -> None:
    """Removes what ``from_pretrained`` with a :class:`FastpathConfig` left on a model that is no longer packed."""
    if isinstance(getattr(model.config, "quantization_config", None), FastpathQuantizationConfig):
        model.hf_quantizer.remove_quantization_config(model)
        model.config._is_quantized = False
