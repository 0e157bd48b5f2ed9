"""A new token of each row into an int8 KV cache, and its attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hf_fastpath.ops import _step
from hf_fastpath.ops._append import NOTHING, QKTransform
from hf_fastpath.ops.attn_decode_int8 import attn_decode_int8_reference
from hf_fastpath.ops.kv_int8_append import STORAGE, kv_int8_append_reference

_op, attn_step_int8_reference = _step.define(
    "attn_step_int8", STORAGE, kv_int8_append_reference, attn_decode_int8_reference
)


def attn_step_int8(
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
    """Appends a token a row as :func:`kv_int8_append` does, and attends as :func:`attn_decode_int8`: the bits of both,
    in one kernel.

    Args:
        query: ``(B, H, 1, D)``; key, value: ``(B, H_kv, 1, D)``; any strides with a contiguous last dimension. On CUDA
            D is a multiple of 16 up to 256; rows that are not aligned to 16 bytes, and more than 8 query heads a KV
            head, take two kernels.
        storage: that of :class:`hf_fastpath.caches.int8.Int8KVLayer`, with room for the token, which is counted.
        transform: what is done to query and key.
        mask, scaling, tickets, reference: see :func:`attn_decode_int8`; the mask counts the new token.

    Returns ``(B, H, D)``, contiguous.
    """
    step = attn_step_int8_reference if reference else _op
    return _step.call(step, (query, key, value), storage, transform, mask, scaling, tickets)
