"""What the int4 checkpoint formats share: their interface, unpacking of nibbles, and fitting groups to our layout.

A checkpoint is converted when ``GroupQuantized.dequantize()`` of the result is the weight that the format's own formula
gives, bit for bit, up to the order of columns. What cannot be converted exactly is refused with ``Unsupported``.
"""

from __future__ import annotations

import abc
import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from hf_fastpath.errors import Unsupported
from hf_fastpath.packing import GROUP_SIZES, SYMMETRIC_ZERO, ceil_div
from hf_fastpath.quantize import GroupQuantized

CODES_PER_WORD = 8  # int4 codes in an int32, in all three formats
PER_CHANNEL = -1
# Options of a rule of GPTQModel's "dynamic" that change what a layer's tensors hold.
_LAYOUT_OPTIONS = ("bits", "group_size", "sym", "desc_act", "pack_dtype", "format", "checkpoint_format", "method")


@dataclasses.dataclass(frozen=True)
class CheckpointFormat(abc.ABC):
    """How the linear layers of one checkpoint are stored, parsed from its ``quantization_config``.

    group_size: input features that share a scale, as the checkpoint says; -1: one scale a row.
    symmetric: whether every zero point is 8; None: the configuration does not say.
    """

    group_size: int
    symmetric: bool | None

    METHOD: ClassVar[str]  # "quant_method" in config.json

    @property
    @abc.abstractmethod
    def suffixes(self) -> tuple[str, ...]:
        """Last parts of the names of a layer's tensors, its bias not among them."""

    @property
    def optional_suffixes(self) -> tuple[str, ...]:
        """Those of :attr:`suffixes` that a checkpoint may lack."""
        return ()

    @abc.abstractmethod
    def quantizes(self, layer_name: str) -> bool:
        """Whether the configuration says that the linear layer of this dotted module name is stored as int4."""

    @abc.abstractmethod
    def shape_of(self, layer_name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """``(out_features, in_features)`` of a layer, from the shapes of its tensors by full name."""

    @abc.abstractmethod
    def convert(
        self, layer_name: str, tensors: Mapping[str, torch.Tensor]
    ) -> tuple[GroupQuantized, torch.Tensor | None]:
        """One layer's tensors, by full name, in our form.

        Returns:
            The quantized weight ``(N, K)`` and None; or, where groups are not contiguous in K, the weight with its
            columns sorted by group and their order, int64 ``(K,)``: ``y = x[..., order] @ weight.T``.

        Raises:
            Unsupported: a tensor is missing, has another shape or dtype, or holds what we cannot hold exactly.
        """

    def tensor_names(self, layer_name: str) -> tuple[str, ...]:
        """Full names of the tensors that :meth:`convert` takes, the optional ones too."""
        return tuple(f"{layer_name}.{suffix}" for suffix in self.suffixes)


class LayerTensors:
    """The tensors of one layer by suffix; taking one checks its dtype and shape."""

    def __init__(self, layer_name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        self.layer_name = layer_name
        self._tensors = tensors

    def has(self, suffix: str) -> bool:
        return f"{self.layer_name}.{suffix}" in self._tensors

    def take(self, suffix: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """The tensor of that suffix. shape: what it must be; None: any two dimensions."""
        tensor = self._tensors.get(f"{self.layer_name}.{suffix}")
        if tensor is None:
            raise Unsupported(f"{self.layer_name}: the checkpoint has no {self.layer_name}.{suffix}")
        if tensor.dtype not in dtypes:
            self.refuse(suffix, f"is {tensor.dtype}, expected {' or '.join(str(dtype) for dtype in dtypes)}")
        if shape is None and (tensor.dim() != 2 or tensor.numel() == 0):
            self.refuse(suffix, f"has the shape {tuple(tensor.shape)}, expected two dimensions, not empty")
        if shape is not None and tuple(tensor.shape) != shape:
            self.refuse(suffix, f"has the shape {tuple(tensor.shape)}, expected {shape}")
        return tensor

    def refuse(self, suffix: str, what: str) -> None:
        raise Unsupported(f"{self.layer_name}.{suffix} {what}")


def take_scales(tensors: LayerTensors, suffix: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Finite scales of that shape in a 16-bit type. float32 is narrowed to the first that loses nothing."""
    scales = tensors.take(suffix, (torch.float16, torch.bfloat16, torch.float32), shape)
    if not bool(scales.isfinite().all()):
        tensors.refuse(suffix, "holds NaN or infinity")
    if scales.dtype != torch.float32:
        return scales
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(scales.to(dtype).float(), scales):
            return scales.to(dtype)
    raise Unsupported(
        f"{tensors.layer_name}.{suffix} is float32 and neither float16 nor bfloat16 holds its values exactly: "
        "save the checkpoint in one of these types first"
    )


def group_count(in_features: int, group_size: int) -> int:
    return 1 if group_size == PER_CHANNEL else ceil_div(in_features, group_size)


def sequential_groups(in_features: int, group_size: int) -> torch.Tensor:
    """The group of each column where groups are contiguous: ``k // group_size``, int64 ``(K,)``."""
    columns = torch.arange(in_features)
    return torch.zeros_like(columns) if group_size == PER_CHANNEL else columns // group_size


def unpack_words(words: torch.Tensor) -> torch.Tensor:
    """int32 ``(...)`` to its eight 4-bit codes, lowest bits first: uint8 ``(..., 8)``."""
    # clone, because contiguous() keeps the stride of a dimension of one, which view() to bytes does not take
    pairs = words.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).view(*words.shape, CODES_PER_WORD)


def check_group_size(group_size: Any, method: str) -> int:
    """A configuration's group size when it is one that can be converted: -1 or a multiple of 32."""
    smallest = min(GROUP_SIZES)
    is_int = isinstance(group_size, int) and not isinstance(group_size, bool)
    if not is_int or (group_size != PER_CHANNEL and (group_size <= 0 or group_size % smallest)):
        raise Unsupported(
            f"{method} checkpoint: group_size {group_size!r} cannot be converted: allowed are -1 (one scale a row) "
            f"and multiples of {smallest}"
        )
    return int(group_size)


def assemble(
    layer_name: str, q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, column_group: torch.Tensor
) -> tuple[GroupQuantized, torch.Tensor | None]:
    """The layer in groups of 128, 64 or 32: the largest that no group of the checkpoint breaks.

    Larger groups, whole rows and a shorter last group are exact by repeating scale and zero point.

    Args:
        q: uint8 ``(N, K)``. scale, zero: ``(N, groups)``; zero None: all 8, which it also becomes when they are.
        column_group: int64 ``(K,)``, the group of each column.

    Returns:
        As :meth:`CheckpointFormat.convert`.
    """
    order = None
    if bool((column_group[1:] < column_group[:-1]).any()):
        order = torch.argsort(column_group, stable=True)
        q, column_group = q[:, order], column_group[order]
    group_size = _common_group_size(column_group)
    if group_size is None:
        sizes = ", ".join(str(size) for size in sorted(set(torch.bincount(column_group).tolist()))[:8])
        raise Unsupported(
            f"{layer_name}: in_features {q.shape[1]} in groups of {sizes} columns cannot be cut into equal groups of "
            f"{', '.join(map(str, GROUP_SIZES))}"
        )
    of_block = column_group[::group_size]
    if zero is not None and bool((zero == SYMMETRIC_ZERO).all()):
        zero = None
    scale = scale[:, of_block].contiguous()
    return GroupQuantized(q, scale, None if zero is None else zero[:, of_block].contiguous(), group_size), order


def _common_group_size(column_group: torch.Tensor) -> int | None:
    for size in GROUP_SIZES:
        if column_group.numel() % size == 0:
            blocks = column_group.view(-1, size)
            if bool((blocks == blocks[:, :1]).all()):
                return size
    return None


def has_numbered_part(layer_name: str) -> bool:
    """Whether the layer is in a numbered decoder layer, outside of which GPTQ and AWQ tools quantize nothing."""
    return any(part.isdigit() for part in layer_name.split("."))


def compile_pattern(pattern: str, method: str, where: str) -> str:
    """The pattern, once it is known to be a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise Unsupported(f"{method} checkpoint: {where} {pattern!r} is not a regular expression: {error}") from None
    return pattern


def skip_patterns(dynamic: Mapping[str, Any], method: str) -> tuple[str, ...]:
    """The "-:" rules of GPTQModel's ``dynamic``, regular expressions from the start of a layer's name.

    Raises:
        Unsupported: another rule changes what a layer's tensors hold.
    """
    patterns = []
    for rule, options in dynamic.items():
        changed = [option for option in _LAYOUT_OPTIONS if option in (options or {})]
        if rule.startswith("-:"):
            patterns.append(compile_pattern(rule[2:], method, "dynamic rule"))
        elif changed:
            raise Unsupported(
                f"{method} checkpoint: the dynamic rule {rule!r} sets {', '.join(changed)} for some layers: all layers "
                "must be stored alike, only '-:' rules are allowed"
            )
    return tuple(patterns)
