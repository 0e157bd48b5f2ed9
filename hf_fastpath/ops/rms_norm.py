"""RMSNorm (Zhang and Sennrich, 2019) in one kernel, where transformers takes six operations."""

from __future__ import annotations

import torch

from hf_fastpath.ops import _library
from hf_fastpath.ops._rms_norm import rms_norm as rms_norm_reference

SCHEMA = "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor"


def _fake(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x.new_empty(x.shape)


_op = _library.define(SCHEMA, rms_norm_reference, _fake)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``(M, K)`` in ``x.dtype``, contiguous, each row normalized, with the roundings of LlamaRMSNorm.

    Args:
        x: ``(M, K)``, any M. On CUDA: fp16 or bf16, K a multiple of 8, the last dimension contiguous, every row aligned
            to 16 bytes.
        weight: ``(K,)`` in ``x.dtype``, on CUDA aligned to 16 bytes.

    A row has the same bits for every M: those that the products with a norm
    (:func:`~hf_fastpath.ops.w4a16_linear_fused`, :func:`~hf_fastpath.ops.linear_16bit`) multiply. Raises RuntimeError,
    in words, for arguments that do not fit.
    """
    return _op(x, weight, eps)
