"""Packed int4 weights back to a float matrix: for products with many rows, and for tests."""

from __future__ import annotations

import torch

from hf_fastpath import packing
from hf_fastpath.ops import _library

SCHEMA = (
    "w4a16_dequantize(Tensor qweight, Tensor scales, Tensor? zeros, int in_features, int out_features, "
    "int group_size) -> Tensor"
)

w4a16_dequantize_reference = packing.dequantize


def _fake(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    in_features: int,
    out_features: int,
    group_size: int,
) -> torch.Tensor:
    return scales.new_empty((out_features, in_features))


_op = _library.define(SCHEMA, w4a16_dequantize_reference, _fake)


def w4a16_dequantize(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    in_features: int,
    out_features: int,
    group_size: int,
    *,
    reference: bool = False,
) -> torch.Tensor:
    """The weight ``(out_features, in_features)`` in ``scales.dtype``; bit-identical on every device.

    Args:
        qweight, scales, zeros: see :mod:`hf_fastpath.packing`.
        reference: run the reference implementation, on any device.
    """
    run = w4a16_dequantize_reference if reference else _op
    return run(qweight, scales, zeros, in_features, out_features, group_size)
