"""RMSNorm of rows, for products that do not normalize them themselves."""

from __future__ import annotations

import torch

from hf_fastpath.ops import _library
from hf_fastpath.ops import _rms_norm as reference

SCHEMA = "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor"


def _fake(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x.new_empty(x.shape)


_op = _library.define(SCHEMA, reference.rms_norm, _fake)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``(M, K)`` in ``x.dtype``, contiguous: Zhang and Sennrich, 2019, with the roundings of LlamaRMSNorm.

    Args:
        x: ``(M, K)``, any M. On CUDA fp16 or bf16, K a multiple of 8, every row aligned to 16 bytes.
        weight: ``(K,)`` in ``x.dtype``, on CUDA aligned to 16 bytes.

    A row's result has the same bits for every M, and those of the norm in
    :func:`~hf_fastpath.ops.w4a16_linear_fused`. Raises RuntimeError, in words, for arguments that do not fit.
    """
    return _op(x, weight, eps)
