"""The residual stream at a norm: a sum, and its RMSNorm."""

from __future__ import annotations

import torch

from hf_fastpath.ops import _library
from hf_fastpath.ops._rms_norm import rms_norm

SCHEMA = "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)"


def add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return total, rms_norm(total, weight, eps)


def _fake(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


_op = _library.define(SCHEMA, add_rms_norm_reference, _fake)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x + residual`` and :func:`~hf_fastpath.ops.rms_norm` of it, both ``(M, K)`` in ``x.dtype`` and contiguous.

    Args:
        x, weight, eps: as there.
        residual: ``(M, K)`` in ``x.dtype``, contiguous, on CUDA aligned to 16 bytes.

    The sum is rounded before it is normalized, as transformers' modules do.
    """
    total, normalized = _op(x, residual, weight, eps)
    return total, normalized
