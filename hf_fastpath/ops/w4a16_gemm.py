"""``y = x @ W.T + bias`` for many rows of x, W packed int4: the product of large decode batches and of prefill."""

from __future__ import annotations

import dataclasses

import torch

from hf_fastpath.ops import _library
from hf_fastpath.ops.w4a16_linear import w4a16_linear_reference

SCHEMA = (
    "w4a16_gemm(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias, int out_features, "
    "int group_size, int variant) -> Tensor"
)


@dataclasses.dataclass(frozen=True)
class GemmVariant:
    """One compiled form of the CUDA kernel; csrc/w4a16/gemm.cuh has the same table.

    instruction: "mma" (mma.sync, compute capability 8.0 and newer), "wgmma" or "prefill" (wgmma with x copied by the
        engine for boxes of matrices; both 9.0 only).
    outputs, tokens: the tile that one CTA computes, in output features and rows of x.
    split: whether K is divided, so that all multiprocessors get equal shares however few tiles there are ("stream-K").
    exact_weights: a group's sum is multiplied by its scale in float32; else each weight, ``(q - zero) * scale``, is
        rounded to 16 bits first, to the bits of w4a16_dequantize.
    early_sum: the second kernel of split variants, which adds the parts, is launched while the first still runs
        (programmatic dependent launch).
    steps: of "prefill", how many times 16 columns are one group of wgmma.
    """

    instruction: str
    outputs: int
    tokens: int
    split: bool
    exact_weights: bool = True
    early_sum: bool = False
    steps: int = 0

    @property
    def name(self) -> str:
        """For tables: "mma_256x64_split"."""
        schedule = "split" if self.split else "whole"
        steps = f"_steps{self.steps}" if self.steps else ""
        return f"{self.instruction}_{self.outputs}x{self.tokens}_{schedule}{steps}{'_early' if self.early_sum else ''}"


VARIANTS = (
    GemmVariant("mma", 128, 32, split=True),
    GemmVariant("mma", 256, 32, split=True),
    GemmVariant("mma", 128, 64, split=True),
    GemmVariant("mma", 256, 64, split=True),
    GemmVariant("wgmma", 256, 32, split=True),
    GemmVariant("wgmma", 128, 64, split=True),
    GemmVariant("wgmma", 256, 64, split=True),
    GemmVariant("wgmma", 128, 64, split=True, early_sum=True),
    GemmVariant("wgmma", 256, 64, split=True, early_sum=True),
    GemmVariant("prefill", 128, 256, split=False, exact_weights=False, steps=2),
    GemmVariant("prefill", 128, 256, split=False, exact_weights=False, steps=1),
    GemmVariant("prefill", 128, 256, split=False, exact_weights=False, steps=4),
    GemmVariant("prefill", 256, 128, split=False, exact_weights=False, steps=2),
    GemmVariant("prefill", 128, 128, split=False, exact_weights=False, steps=2),
    GemmVariant("prefill", 128, 256, split=True, exact_weights=False, early_sum=True, steps=2),
    GemmVariant("prefill", 128, 128, split=True, exact_weights=False, early_sum=True, steps=2),
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
) -> torch.Tensor:
    """The same product in float32, rounded once to ``x.dtype``, for every variant."""
    return w4a16_linear_reference(x, qweight, scales, zeros, bias, out_features, group_size)


def _fake(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
    group_size: int,
    variant: int,
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
) -> torch.Tensor:
    """``(M, K)`` times packed ``(N, K)`` transposed: ``(M, N)`` in ``x.dtype``, accumulated in float32.

    Args:
        x: ``(M, K)``, last dimension contiguous, any row stride and any M; rows that all start at a multiple of 16
            bytes are read fastest. On CUDA of the dtype of ``scales``.
        qweight, scales, zeros: see :mod:`hf_fastpath.packing`; on CUDA aligned to 16 bytes.
        bias: ``(N,)`` in ``x.dtype`` or None.
        variant: index into :data:`VARIANTS`; every variant takes every shape. :mod:`hf_fastpath.heuristics` knows
            which to take. The CPU implementation has one form and ignores it.

    Rounding on CUDA: ``q - zero`` is exact; with :attr:`GemmVariant.exact_weights` a group's sum is float32, is
    multiplied by its scale in float32, and only the result is rounded; without, each weight is rounded to 16 bits
    once besides, as in w4a16_dequantize. The same call gives the same bits on the same GPU model; another variant or
    another number of rows adds in another order.

    Split variants need a workspace of up to two tiles in float32 for each multiprocessor: 34 MB on an H200 for
    256 x 128.

    Raises RuntimeError, in words, for arguments that do not fit and for a variant that this GPU cannot run.
    """
    return _op(x, qweight, scales, zeros, bias, out_features, group_size, variant)
