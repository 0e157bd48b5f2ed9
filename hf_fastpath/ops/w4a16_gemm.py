"""``y = residual + x @ W.T + bias`` for many rows of x, W packed int4: large decode batches and prefill."""

from __future__ import annotations

import dataclasses

import torch

from hf_fastpath.ops import _library
from hf_fastpath.ops.w4a16_linear_fused import w4a16_linear_fused_reference

SCHEMA = (
    "w4a16_gemm(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias, int out_features, "
    "int group_size, int variant, Tensor? residual) -> Tensor"
)


@dataclasses.dataclass(frozen=True)
class GemmVariant:
    """One form of the CUDA kernels; csrc/w4a16/gemm.cuh has the same table.

    instruction: "mma" (mma.sync, compute capability 8.0 and newer) or "wgmma" (9.0 only).
    tokens: rows of x of the tile that one CTA, or one cluster, computes; it has 128 output features.
    splits: of "wgmma", how many CTAs of a cluster divide K among them and add their parts. "mma" divides all work in
        equal shares instead ("stream-K"), and a second kernel adds the parts.
    """

    instruction: str
    tokens: int
    splits: int = 0

    @property
    def exact_weights(self) -> bool:
        """Whether a group's sum is multiplied by its scale, in float32.

        Else each weight, ``(q - zero) * scale``, is rounded to 16 bits first, to the bits of w4a16_dequantize.
        """
        return self.instruction == "mma"

    @property
    def name(self) -> str:
        """For tables: "wgmma_128x64_splits4"."""
        return f"{self.instruction}_128x{self.tokens}" + (f"_splits{self.splits}" if self.splits else "")


VARIANTS = (
    GemmVariant("mma", 32),
    GemmVariant("mma", 64),
    *(GemmVariant("wgmma", tokens, splits) for tokens in (32, 64) for splits in (1, 2, 4, 6, 7)),
    *(GemmVariant("wgmma", tokens, splits) for tokens in (128, 256) for splits in (1, 2, 4)),
)


def w4a16_gemm_reference(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
    group_size: int,
    variant: int,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """The same product in float32, rounded once to ``x.dtype``, for every variant."""
    return w4a16_linear_fused_reference(x, qweight, scales, zeros, bias, None, 0.0, residual, out_features, group_size)


def _fake(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
    group_size: int,
    variant: int,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], out_features))


_op = _library.define(SCHEMA, w4a16_gemm_reference, _fake)


def w4a16_gemm(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
    group_size: int,
    variant: int,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """``(M, N)`` in ``x.dtype``: ``(M, K)`` times packed ``(N, K)`` transposed, plus bias and residual.

    Args:
        x: ``(M, K)``, last dimension contiguous, any row stride and any M; rows that all start at a multiple of 16
            bytes are read fastest. On CUDA of the dtype of ``scales``.
        qweight, scales, zeros: see :mod:`hf_fastpath.packing`; on CUDA aligned to 16 bytes.
        bias: ``(N,)`` in ``x.dtype`` or None.
        variant: index into :data:`VARIANTS`; every variant takes every shape. :mod:`hf_fastpath.heuristics` knows
            which to take. The CPU implementation has one form and ignores it.
        residual: ``(M, N)`` in ``x.dtype``, contiguous, or None.

    Rounding on CUDA: ``q - zero`` is exact; with :attr:`GemmVariant.exact_weights` a group's sum is float32, is
    multiplied by its scale in float32, and only the result, with bias and residual, is rounded; without, each weight is
    rounded to 16 bits once besides, as in w4a16_dequantize. The same call gives the same bits on the same GPU model;
    another variant or another number of rows adds in another order.

    "mma" variants need a workspace of up to four tiles in float32 for each multiprocessor: 14 MB for 128 x 64 on an
    A100.

    Raises RuntimeError, in words, for arguments that do not fit and for a variant that this GPU cannot run.
    """
    return _op(x, qweight, scales, zeros, bias, out_features, group_size, variant, residual)
