"""Rows of an embedding table, for the few tokens of a decode step."""

from __future__ import annotations

import torch

from hf_fastpath.ops import _library

SCHEMA = "embedding_rows(Tensor ids, Tensor weight) -> Tensor"


def embedding_rows_reference(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight.index_select(0, ids)


def _fake(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight.new_empty((ids.shape[0], weight.shape[1]))


_op = _library.define(SCHEMA, embedding_rows_reference, _fake)


def embedding_rows(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``(M, D)`` in ``weight.dtype``: the rows ``ids`` of ``weight``.

    ``torch.index_select``, which ``nn.Embedding`` calls, has a kernel for up to 16 indices that goes through them one
    after the other: on an H200 14 us for 16 rows of 4096 columns. And the kernel behind this one may begin before it
    has ended (programmatic dependent launch).

    Args:
        ids: int64 ``(M,)``, on CUDA contiguous, M up to 65535. One that is not in ``0 .. V - 1`` is an IndexError, on
            CUDA an error of the kernel, as of PyTorch's.
        weight: ``(V, D)``; on CUDA float16 or bfloat16, contiguous, aligned to 16 bytes, D a multiple of 8.
    """
    return _op(ids, weight)
