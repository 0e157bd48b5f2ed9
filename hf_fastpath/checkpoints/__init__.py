"""Checkpoints that were quantized to int4 by other tools, converted exactly. Pure torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_fastpath.checkpoints.base import CheckpointFormat
from hf_fastpath.checkpoints.gptq import GPTQFormat
from hf_fastpath.errors import Unsupported

__all__ = ["CheckpointFormat", "GPTQFormat", "detect_format"]

_FORMATS: tuple[type[GPTQFormat], ...] = (GPTQFormat,)


def detect_format(quantization_config: Mapping[str, Any]) -> CheckpointFormat:
    """The format that ``quantization_config`` of a checkpoint's config.json describes.

    Raises:
        Unsupported: an unknown ``quant_method``, or options of a known one that cannot be converted exactly.
    """
    method = str(getattr(quantization_config.get("quant_method"), "value", quantization_config.get("quant_method")))
    for candidate in _FORMATS:
        if candidate.METHOD == method.lower():
            return candidate.from_config(quantization_config)
    allowed = ", ".join(repr(candidate.METHOD) for candidate in _FORMATS)
    raise Unsupported(f"checkpoints of quant_method {method!r} cannot be converted: possible are {allowed}")
