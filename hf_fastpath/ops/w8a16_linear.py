"""``y = x @ (q * scale).T + bias`` for a few rows of x, q packed int8 with one scale an output (a model's head)."""

from __future__ import annotations

import torch

from hf_fastpath import packing_int8
from hf_fastpath.ops import _library

MAX_ROWS = 16  # rows the CUDA kernel takes; more rows go through w8a16_dequantize and cuBLAS
# Row tiles that the CPU implementation expands at a time: a head may have 128,256 rows, 2 GB of float32.
BAND_TILES = 256

SCHEMA = "w8a16_linear(Tensor x, Tensor qweight, Tensor scales, Tensor? bias, int out_features) -> Tensor"


def w8a16_linear_reference(
    x: torch.Tensor, qweight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, out_features: int
) -> torch.Tensor:
    """Sums of products, times the scale, plus the bias, in float32; rounded once to ``x.dtype``."""
    y = x.new_empty((x.shape[0], out_features))
    wide = x.float()
    for first in range(0, qweight.shape[0], BAND_TILES):
        band = slice(first * 16, min((first + BAND_TILES) * 16, out_features))
        q = packing_int8.unpack_int8(qweight[first : first + BAND_TILES], band.stop - band.start)
        sums = (wide @ q.float().T) * scales[band].float()
        y[:, band] = sums if bias is None else sums + bias[band].float()
    return y


def _fake(
    x: torch.Tensor, qweight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, out_features: int
) -> torch.Tensor:
    return x.new_empty((x.shape[0], out_features))


_op = _library.define(SCHEMA, w8a16_linear_reference, _fake)


def w8a16_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    *,
    reference: bool = False,
) -> torch.Tensor:
    """``(M, K)`` times packed ``(N, K)`` transposed: ``(M, N)`` in ``x.dtype``, accumulated in float32.

    Args:
        x: ``(M, K)``, last dimension contiguous, any row stride. On CUDA: M in 1..16, the dtype of ``scales``.
        qweight, scales: see :mod:`hf_fastpath.packing_int8`.
        bias: ``(N,)`` in ``x.dtype`` or None.
        reference: run the reference implementation, on any device, for any M.

    The scale is applied to the sum, so unlike in :func:`w8a16_dequantize` no weight is rounded to 16 bits. A row's
    result has the same bits for every M.
    """
    run = w8a16_linear_reference if reference else _op
    return run(x, qweight, scales, bias, out_features)
