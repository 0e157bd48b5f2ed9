"""compressed-tensors checkpoints (llm-compressor), format "pack-quantized", int4 weights, 16-bit activations.

A layer of ``(N, K)`` in G groups has

* ``weight_packed`` int32 ``(N, ceil(K/8))``: bits 4i..4i+3 of word ``[n, c]`` are the code of column ``8c + i``, stored
  plus 8 (codes are -8..7 in the format, 0..15 with zero point 8 in ours: the stored value is ours),
* ``weight_scale`` ``(N, G)``; ``weight_shape`` ``(2,)``, N and K,
* where ``symmetric`` is false, ``weight_zero_point``, plus 8 too and packed along N: int32 ``(ceil(N/8), G)``; releases
  before that packing stored int8 ``(N, G)``, -8..7,
* where ``actorder`` is "group", ``weight_g_idx`` int32 ``(K,)``, the group of each column; -1 in it: in order,

and the weight ``w[n, k] = (code - zero) * weight_scale[n, group of k]`` (``PackedQuantizationCompressor``,
``pack_to_int32`` and ``_process_group`` in compressed-tensors). ``kv_cache_scheme`` is refused, since without it the
model would not compute what the checkpoint says; so are transforms, sparsity and quantized activations.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from hf_fastpath.checkpoints.base import (
    CODES_PER_WORD,
    PER_CHANNEL,
    CheckpointFormat,
    LayerTensors,
    assemble,
    check_group_size,
    compile_pattern,
    group_count,
    sequential_groups,
    take_scales,
    unpack_words,
)
from hf_fastpath.errors import Unsupported
from hf_fastpath.packing import SYMMETRIC_ZERO, ceil_div
from hf_fastpath.quantize import GroupQuantized

_METHOD = "compressed-tensors"
_FORMAT = "pack-quantized"
_REGEX = "re:"


@dataclasses.dataclass(frozen=True)
class CompressedTensorsFormat(CheckpointFormat):
    """A compressed-tensors checkpoint; the layout is in this module's docstring.

    targets, ignore: full layer names, "re:" and a regular expression matched from the start of the name, or the class
    "Linear". A layer is quantized when one of the targets matches and none of ``ignore``.
    reordered: whether columns are in groups by ``weight_g_idx`` (``actorder`` "group").
    """

    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] = ()
    reordered: bool = False

    METHOD: ClassVar[str] = _METHOD

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> CompressedTensorsFormat:
        """Parses ``quantization_config``.

        Raises:
            Unsupported: anything but one scheme of packed int4 weights alone.
        """
        config = config.get("quantization_config") or config  # some releases of transformers nested it
        _check_config(config)
        groups = _config_groups(config)
        weights = groups[0]["weights"]
        group_size = PER_CHANNEL if _strategy(weights) == "channel" else weights.get("group_size")
        return cls(
            group_size=check_group_size(group_size, _METHOD),
            symmetric=bool(weights.get("symmetric", True)),
            targets=tuple(_checked_name(name) for group in groups for name in group.get("targets") or ()),
            ignore=tuple(_checked_name(name) for name in config.get("ignore") or ()),
            reordered=_is_reordered(weights),
        )

    @property
    def suffixes(self) -> tuple[str, ...]:
        zero = () if self.symmetric else ("weight_zero_point",)
        order = ("weight_g_idx",) if self.reordered else ()
        return ("weight_packed", "weight_scale", "weight_shape", *zero, *order)

    @property
    def optional_suffixes(self) -> tuple[str, ...]:
        return ("weight_shape",)

    def quantizes(self, layer_name: str) -> bool:
        targeted = any(_matches(layer_name, target) for target in self.targets)
        return targeted and not any(_matches(layer_name, name) for name in self.ignore)

    def shape_of(self, layer_name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        # A K that is not a multiple of 8 is not one of 32 either, and cannot be converted.
        out_features, words = shapes[f"{layer_name}.weight_packed"]
        return out_features, words * CODES_PER_WORD

    def convert(
        self, layer_name: str, tensors: Mapping[str, torch.Tensor]
    ) -> tuple[GroupQuantized, torch.Tensor | None]:
        layer = LayerTensors(layer_name, tensors)
        packed = layer.take("weight_packed", (torch.int32,))
        n, k = _shape(layer, packed)
        groups = group_count(k, self.group_size)
        scale = take_scales(layer, "weight_scale", (n, groups))
        zero = None if self.symmetric else _zero_points(layer, n, groups)
        column_group = self._column_groups(layer, k).to(packed.device)
        q = unpack_words(packed).reshape(n, -1)[:, :k].contiguous()
        return assemble(layer_name, q, scale, zero, column_group)

    def _column_groups(self, layer: LayerTensors, k: int) -> torch.Tensor:
        sequential = sequential_groups(k, self.group_size)
        if not self.reordered:
            return sequential
        g_idx = layer.take("weight_g_idx", (torch.int32, torch.int64), (k,)).to("cpu", torch.int64)
        if bool((g_idx == -1).any()):
            return sequential
        # The format's own reader sorts columns by group and cuts them into equal groups.
        groups = int(sequential[-1]) + 1
        in_range = int(g_idx.min()) >= 0 and int(g_idx.max()) < groups
        if not in_range or not bool((torch.bincount(g_idx, minlength=groups) == self.group_size).all()):
            layer.refuse("weight_g_idx", f"does not put {self.group_size} columns into each of {groups} groups")
        return g_idx


def _shape(layer: LayerTensors, packed: torch.Tensor) -> tuple[int, int]:
    """``(N, K)``, from weight_shape where there is one."""
    n, words = packed.shape
    if not layer.has("weight_shape"):
        return n, words * CODES_PER_WORD
    shape = layer.take("weight_shape", (torch.int64, torch.int32), (2,)).tolist()
    if shape[0] != n or shape[1] < 1 or ceil_div(shape[1], CODES_PER_WORD) != words:
        layer.refuse("weight_shape", f"holds {shape}, which does not fit weight_packed {tuple(packed.shape)}")
    return n, shape[1]


def _zero_points(layer: LayerTensors, n: int, groups: int) -> torch.Tensor:
    """uint8 ``(N, G)``, with the format's offset of 8."""
    stored = layer.take("weight_zero_point", (torch.int32, torch.int8))
    if stored.dtype == torch.int32:
        layer.take("weight_zero_point", (torch.int32,), (ceil_div(n, CODES_PER_WORD), groups))
        return unpack_words(stored).permute(0, 2, 1).reshape(-1, groups)[:n]
    layer.take("weight_zero_point", (torch.int8,), (n, groups))
    if int(stored.min()) < -SYMMETRIC_ZERO or int(stored.max()) >= SYMMETRIC_ZERO:
        layer.refuse("weight_zero_point", f"holds {int(stored.min())} to {int(stored.max())}, expected -8 to 7")
    return (stored + SYMMETRIC_ZERO).to(torch.uint8)


def _matches(layer_name: str, pattern: str) -> bool:
    if pattern.startswith(_REGEX):
        return re.match(pattern.removeprefix(_REGEX), layer_name) is not None
    return pattern in (layer_name, "Linear")


def _checked_name(name: str) -> str:
    if name.startswith(_REGEX):
        compile_pattern(name.removeprefix(_REGEX), _METHOD, "the pattern")
    return name


def _strategy(weights: Mapping[str, Any]) -> str:
    """What shares a scale; derived from the group size where it is not given, as in the format's own parser."""
    strategy = weights.get("strategy")
    if strategy is not None:
        return str(strategy).lower()
    group_size = weights.get("group_size")
    if group_size is None:
        return "tensor"
    return "channel" if group_size == PER_CHANNEL else "group"


def _is_reordered(weights: Mapping[str, Any]) -> bool:
    """ "weight" ("static") only changes the calibration; "group" ("dynamic", true) the layout."""
    return weights.get("actorder") is True or str(weights.get("actorder")).lower() in ("group", "dynamic")


def _refuse(what: str, allowed: str) -> None:
    raise Unsupported(f"{_METHOD} checkpoint: {what} cannot be converted: {allowed}")


def _check_config(config: Mapping[str, Any]) -> None:
    if config.get("format") != _FORMAT:
        _refuse(f"format {config.get('format')!r}", f"allowed is {_FORMAT!r} (int4 weights, 16-bit activations)")
    if config.get("quantization_status", "compressed") != "compressed":
        _refuse(f"quantization_status {config['quantization_status']!r}", "allowed is 'compressed'")
    sparsity = config.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        _refuse(f"sparsity_config with format {sparsity['format']!r}", "allowed is 'dense'")
    if (config.get("transform_config") or {}).get("config_groups"):
        _refuse("transform_config", "transforms of activations are not applied here")
    if config.get("kv_cache_scheme"):
        _refuse(
            "kv_cache_scheme",
            "the checkpoint's own cache quantization is not applied here; take it out of config.json to use the "
            "weights with another cache",
        )


def _config_groups(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = list((config.get("config_groups") or {}).values())
    if not groups:
        _refuse("a configuration without config_groups", "one group is needed")
    for group in groups:
        if not isinstance(group, Mapping):
            _refuse(f"the preset {group!r} in config_groups", "the scheme must be written out")
        _check_group(group)
    schemes = [_layout(group["weights"]) for group in groups]
    if any(scheme != schemes[0] for scheme in schemes):
        _refuse("config_groups with different weights", "all layers must be stored alike")
    return groups


def _layout(weights: Mapping[str, Any]) -> dict[str, Any]:
    """What decides how a layer's tensors look."""
    return {
        "strategy": _strategy(weights),
        "group_size": weights.get("group_size"),
        "symmetric": bool(weights.get("symmetric", True)),
        "reordered": _is_reordered(weights),
    }


def _check_group(group: Mapping[str, Any]) -> None:
    for part in ("input_activations", "output_activations"):
        if group.get(part):
            _refuse(part, "allowed are int4 weights with 16-bit activations")
    if (group.get("format") or _FORMAT) != _FORMAT:
        _refuse(f"a config group of format {group['format']!r}", f"allowed is {_FORMAT!r}")
    weights = group.get("weights") or {}
    kind = f"{weights.get('type', 'int')}{weights.get('num_bits', 8)}"
    if kind != "int4":
        _refuse(f"{kind} weights", "allowed are int4 weights with 16-bit activations")
    if weights.get("dynamic"):
        _refuse("dynamic quantization of weights", "allowed is static")
    if _strategy(weights) not in ("group", "channel"):
        _refuse(f"weights with strategy {_strategy(weights)!r}", "allowed are 'group' and 'channel'")
