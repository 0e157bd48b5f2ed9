"""A new token of each row into a full-precision KV cache, and its attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hf_fastpath.ops import _step
from hf_fastpath.ops._append import NOTHING, QKTransform
from hf_fastpath.ops.attn_decode_static import attn_decode_static_reference
from hf_fastpath.ops.kv_static_append import kv_static_append_reference

STORAGE = "Tensor(a!) keys, Tensor(b!) values, Tensor(c!) lengths"

_op, attn_step_static_reference = _step.define(
    "attn_step_static", STORAGE, kv_static_append_reference, attn_decode_static_reference
)


def attn_step_static(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    storage: Sequence[torch.Tensor],
    mask: torch.Tensor | None,
    scaling: float,
    *,
    transform: QKTransform = NOTHING,
    tickets: torch.Tensor | None = None,
    reference: bool = False,
) -> torch.Tensor:
    """Appends a token a row as :func:`kv_static_append` does, and attends as :func:`attn_decode_static`: the bits of
    both, in one kernel.

    Args:
        storage: that of :class:`hf_fastpath.caches.static.StaticKVLayer`, with room for the token, which is counted.
        query, key, value, transform, mask, scaling, tickets, reference: see :func:`attn_step_int8`.

    Returns ``(B, H, D)``, contiguous.
    """
    step = attn_step_static_reference if reference else _op
    return _step.call(step, (query, key, value), storage, transform, mask, scaling, tickets)
