"""Packed int8 weights back to a float matrix: for products with many rows, and for tests."""

from __future__ import annotations

import torch

from hf_fastpath import packing_int8
from hf_fastpath.ops import _library

SCHEMA = "w8a16_dequantize(Tensor qweight, Tensor scales, int out_features) -> Tensor"

w8a16_dequantize_reference = packing_int8.dequantize_int8


def _fake(qweight: torch.Tensor, scales: torch.Tensor, out_features: int) -> torch.Tensor:
    return scales.new_empty((out_features, qweight.shape[1] * packing_int8.TILE_COLS))


_op = _library.define(SCHEMA, w8a16_dequantize_reference, _fake)


def w8a16_dequantize(
    qweight: torch.Tensor, scales: torch.Tensor, out_features: int, *, reference: bool = False
) -> torch.Tensor:
    """The weight ``(out_features, K)`` in ``scales.dtype``; bit-identical on every device.

    Args:
        qweight, scales: see :mod:`hf_fastpath.packing_int8`.
        reference: run the reference implementation, on any device.
    """
    run = w8a16_dequantize_reference if reference else _op
    return run(qweight, scales, out_features)
