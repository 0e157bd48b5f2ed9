"""The rows of a slot that a batch leaves over, which a step's graph computes all the same.

A graph is of one number of rows. That of all rows of a slot serves each batch that the slot is for: 5 to 8 rows share
one. What comes out for a row must then not depend on how many others there are, or near ties greedy tokens would be
others than those of the step by itself. It does not in our kernels for 2 to ``MAX_ROWS`` rows (one row alone, which has
a slot of its own, has other bits); with more rows, in cuBLAS's products and in PyTorch's sums it does, and there a
graph is of one batch size.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import nn

from hf_fastpath.modules import MoERouter
from hf_fastpath.ops.w4a16_linear import MAX_ROWS


class SpareRows(enum.Enum):
    """What rows that no batch has are to a model's steps."""

    NONE = "there are none: a graph is of one batch size"
    EMPTY = "rows of their own, that begin without a token: their attention costs next to nothing"
    REPEATED = "the first rows once more: no other expert's weights are read for them"


class StoredRows(Protocol):
    """What a layer of a cache shows of its rows: see :class:`hf_fastpath.caches.layer.FastLayer`."""

    @property
    def zero_if_empty(self) -> torch.Tensor: ...

    def used(self, length: int) -> list[torch.Tensor]: ...


def spare_rows_of(model: nn.Module) -> SpareRows:
    """What they are to the steps of a patched model, as it is now."""
    if not keeps_row_bits(model, MAX_ROWS):
        return SpareRows.NONE
    return SpareRows.REPEATED if any(isinstance(part, MoERouter) for part in model.modules()) else SpareRows.EMPTY


def keeps_row_bits(module: Any, rows: int) -> bool:
    """Whether a row's bits, of one new token each, do not depend on how many rows there are, up to ``rows``.

    A module that answers for itself and what is in it has a method of this name; others must hold no weights but
    embeddings.
    """
    if isinstance(module, nn.Embedding):
        return True
    if hasattr(module, "keeps_row_bits"):
        return bool(module.keeps_row_bits(rows))
    if next(module.parameters(recurse=False), None) is not None:
        return False
    return all(keeps_row_bits(child, rows) for child in module.children())


def empty_rows(layers: Iterable[StoredRows], rows: slice) -> None:
    """Makes these rows of a cache hold no token."""
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for layer in layers:
        tensor = layer.zero_if_empty
        by_dtype.setdefault(tensor.dtype, []).append(tensor[rows])
    for tensors in by_dtype.values():
        torch._foreach_zero_(tensors)


def repeat_rows(layers: Iterable[StoredRows], rows: slice, length: int) -> None:
    """Makes these rows of a cache hold the ``length`` tokens of as many others, from the first one on."""
    for layer in layers:
        for tensor in layer.used(length):
            tensor[rows] = tensor[: rows.stop - rows.start]
