"""``y = residual + RMSNorm(x) @ W.T + bias`` for a few rows of x and a plain 16-bit W, read as it lies in memory."""

from __future__ import annotations

import torch

from hf_fastpath.ops import _library
from hf_fastpath.ops._rms_norm import rms_norm

# Rows of the weight that the CPU implementation widens at a time: a head may have 128,256, 2 GB of float32.
BAND_ROWS = 4096

SCHEMA = (
    "linear_16bit(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, float eps, Tensor? residual, "
    "bool float32_out) -> Tensor"
)


def normalized_product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, norm_weight: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """``RMSNorm(x) @ W.T + bias`` in float32, not rounded; without ``norm_weight`` of x itself."""
    rows = (x if norm_weight is None else rms_norm(x, norm_weight, eps)).float()
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=torch.float32, device=x.device)
    for first in range(0, weight.shape[0], BAND_ROWS):
        band = slice(first, first + BAND_ROWS)
        y[:, band] = torch.nn.functional.linear(rows, weight[band].float())
    return y if bias is None else y + bias.float()


def linear_16bit_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    float32_out: bool,
) -> torch.Tensor:
    y = normalized_product(x, weight, bias, norm_weight, eps)
    rounded = (y if residual is None else y + residual.float()).to(x.dtype)
    return rounded.float() if float32_out else rounded


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    float32_out: bool,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32 if float32_out else x.dtype)


_op = _library.define(SCHEMA, linear_16bit_reference, _fake)


def linear_16bit(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    float32_out: bool = False,
) -> torch.Tensor:
    """``(M, N)`` in ``x.dtype``: the product of x's RMSNorm and ``weight`` transposed, plus the residual.

    Args:
        x: ``(M, K)``, last dimension contiguous. On CUDA: M in 1..16, K a multiple of 32, every row aligned to 16
            bytes.
        weight: ``(N, K)`` in ``x.dtype``, as ``nn.Linear`` holds it. On CUDA: fp16 or bf16, contiguous, aligned to 16
            bytes.
        bias: ``(N,)`` or None; residual: ``(M, N)`` contiguous or None; both in ``x.dtype``.
        norm_weight: ``(K,)`` in ``x.dtype``, on CUDA aligned to 16 bytes; None: x is taken as it is, and ``eps`` is
            ignored.
        float32_out: the same values in float32: rounded to ``x.dtype`` first, as a model's logits are.

    The norm rounds like LlamaRMSNorm. Product, bias and residual are added in float32 and rounded once. A row's result
    has the same bits for every M. :func:`hf_fastpath.heuristics.linear_16bit_supports` says what runs on a GPU.
    """
    return _op(x, weight, bias, norm_weight, eps, residual, float32_out)


INTO_SCHEMA = "linear_16bit_into(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out) -> ()"


def linear_16bit_into_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    out.copy_(linear_16bit_reference(x, weight, bias, None, 0.0, None, False))


def _into_fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    return None


_into_op = _library.define(INTO_SCHEMA, linear_16bit_into_reference, _into_fake)


def linear_16bit_into(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """:func:`linear_16bit` without norm and residual, into ``out``: ``(M, N)`` in ``x.dtype``, contiguous."""
    _into_op(x, weight, bias, out)
