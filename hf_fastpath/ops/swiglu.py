"""SwiGLU of what a product with a merged gate and up weight gives."""

from __future__ import annotations

import torch

from hf_fastpath.ops import _library

SCHEMA = "swiglu(Tensor x) -> Tensor"


def swiglu_reference(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def _fake(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((x.shape[0], x.shape[1] // 2))


_op = _library.define(SCHEMA, swiglu_reference, _fake)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """``(M, I)`` in ``x.dtype``: ``silu(gate) * up`` (Shazeer, 2020, "GLU Variants Improve Transformer").

    Args:
        x: ``(M, 2 I)``, of a row the gates 0..I - 1 and then the ups. On CUDA fp16 or bf16, contiguous, aligned to 16
            bytes, I a multiple of 8.

    silu(gate) and the result are each rounded to ``x.dtype``, as separate modules do. Raises RuntimeError, in words,
    for arguments that do not fit.
    """
    return _op(x)
