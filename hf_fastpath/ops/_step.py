"""What the ops attn_step_* share: a new token of each row is appended to a cache and attends to what it then holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hf_fastpath.ops import _library
from hf_fastpath.ops._append import QKTransform

ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? q_norm, Tensor? k_norm, float eps, Tensor? cos, Tensor? sin, "
    "bool rotate"
)


def define(
    name: str, storage: str, append: Callable[..., None], attend: Callable[..., torch.Tensor]
) -> tuple[Any, Callable[..., torch.Tensor]]:
    """Defines the op of a format from the schema of its storage and from the references of the two ops that it is one
    of; returns it and its reference."""

    def reference(query: torch.Tensor, *arguments: Any) -> torch.Tensor:
        new, (*stored, tickets, mask, scaling) = arguments[:8], arguments[8:]
        ready = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        append(query, *new, ready, *stored)
        return attend(ready.squeeze(2), *stored, tickets, mask, scaling, 0, 0.0, None)

    def fake(query: torch.Tensor, *arguments: Any) -> torch.Tensor:
        return query.new_empty((query.shape[0], query.shape[1], query.shape[3]))

    schema = f"{name}({ARGUMENTS}, {storage}, Tensor(z!)? tickets, Tensor? mask, float scaling) -> Tensor"
    return _library.define(schema, reference, fake), reference


def call(
    step: Any,
    new: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    storage: Sequence[torch.Tensor],
    transform: QKTransform,
    mask: torch.Tensor | None,
    scaling: float,
    tickets: torch.Tensor | None,
) -> torch.Tensor:
    """Calls an op that :func:`define` made, or its reference, with a new query, key and value."""
    t = transform
    options = (t.q_norm, t.k_norm, t.eps, t.cos, t.sin, t.rotate)
    out: torch.Tensor = step(*new, *options, *storage, tickets, mask, scaling)
    return out
