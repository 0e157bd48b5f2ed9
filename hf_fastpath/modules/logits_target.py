"""Where the logits of a step go: straight to where the next tokens are chosen from, without a copy behind the head."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch


class _Target(threading.local):
    logits: torch.Tensor | None = None


_target = _Target()


@contextlib.contextmanager
def logits_go_to(logits: torch.Tensor | None) -> Iterator[None]:
    """Lets the head of a model that this thread calls meanwhile write into ``logits`` ``(rows, V)``, contiguous; its
    result is a view of that then. It is an offer: many heads make tensors of their own. None: there is none."""
    before, _target.logits = _target.logits, logits
    try:
        yield
    finally:
        _target.logits = before


def logits_target(rows: int, columns: int, like: torch.Tensor) -> torch.Tensor | None:
    """The tensor ``(rows, columns)`` of the dtype and on the device of ``like`` that is offered to a head, or None."""
    target = _target.logits
    if target is None or target.shape != (rows, columns):
        return None
    return target if target.dtype is like.dtype and target.device == like.device else None
