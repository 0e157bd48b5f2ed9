"""``y = residual + RMSNorm(x) @ W.T + bias`` for a few rows of x, W packed int4: a decoder layer's products, fused."""

from __future__ import annotations

import torch

from hf_fastpath import packing
from hf_fastpath.ops import _library
from hf_fastpath.ops._rms_norm import rms_norm

SCHEMA = (
    "w4a16_linear_fused(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias, Tensor? norm_weight, "
    "float eps, Tensor? residual, int out_features, int group_size) -> Tensor"
)


def normalized_product(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    out_features: int,
    group_size: int,
) -> torch.Tensor:
    """``RMSNorm(x) @ W.T + bias`` in float32, not rounded; without ``norm_weight`` of x itself."""
    rows = x if norm_weight is None else rms_norm(x, norm_weight, eps)
    w = packing.dequantize(qweight, scales, zeros, x.shape[1], out_features, group_size).float()
    return torch.nn.functional.linear(rows.float(), w, None if bias is None else bias.float())


def w4a16_linear_fused_reference(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    out_features: int,
    group_size: int,
) -> torch.Tensor:
    y = normalized_product(x, qweight, scales, zeros, bias, norm_weight, eps, out_features, group_size)
    return (y if residual is None else y + residual.float()).to(x.dtype)


def _fake(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    out_features: int,
    group_size: int,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], out_features))


_op = _library.define(SCHEMA, w4a16_linear_fused_reference, _fake)


def w4a16_linear_fused(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    out_features: int,
    group_size: int,
) -> torch.Tensor:
    """``(M, N)`` in ``x.dtype``: the product of x's RMSNorm and packed ``(N, K)`` transposed, plus the residual.

    Args:
        x: ``(M, K)``, last dimension contiguous. On CUDA: M in 1..16, the dtype of ``scales``, every row aligned to 16
            bytes.
        qweight, scales, zeros: see :mod:`hf_fastpath.packing`.
        bias: ``(N,)`` or None; residual: ``(M, N)`` contiguous or None; both in ``x.dtype``.
        norm_weight: ``(K,)`` in ``x.dtype``, on CUDA aligned to 16 bytes; None: x is taken as it is, and ``eps`` is
            ignored.

    The norm rounds like LlamaRMSNorm (:func:`rms_norm`). Product, bias and residual are added in float32 and rounded
    once, where separate modules round the product first. A row's result has the same bits for every M, but for one row
    alone: see :func:`w4a16_linear`.
    """
    return _op(x, qweight, scales, zeros, bias, norm_weight, eps, residual, out_features, group_size)
