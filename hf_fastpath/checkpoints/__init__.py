"""Checkpoints that other tools quantized to int4, converted exactly to our quantized form. Pure torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_fastpath.checkpoints.awq import AWQFormat
from hf_fastpath.checkpoints.base import CheckpointFormat
from hf_fastpath.checkpoints.compressed_tensors import CompressedTensorsFormat
from hf_fastpath.checkpoints.gptq import GPTQFormat
from hf_fastpath.errors import Unsupported

__all__ = ["AWQFormat", "CheckpointFormat", "CompressedTensorsFormat", "GPTQFormat", "detect_format"]

_FORMATS = {cls.METHOD: cls for cls in (GPTQFormat, AWQFormat, CompressedTensorsFormat)}


def detect_format(quantization_config: Mapping[str, Any]) -> CheckpointFormat:
    """The format that ``quantization_config`` of a checkpoint's config.json describes.

    Raises:
        Unsupported: an unknown ``quant_method``, or options of a known one that cannot be converted exactly.
    """
    method = quantization_config.get("quant_method")
    name = str(getattr(method, "value", method)).lower()  # transformers has an enum for it
    if name not in _FORMATS:
        allowed = ", ".join(repr(known) for known in _FORMATS)
        raise Unsupported(f"checkpoints of quant_method {name!r} cannot be converted: possible are {allowed}")
    return _FORMATS[name].from_config(quantization_config)
