"""Quantize new keys and values to int8, one scale a token and head, and write them into the cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hf_fastpath.ops import _append, _groups

INT8_MAX = 127

STORAGE = "Tensor(a!) k_data, Tensor(b!) k_scale, Tensor(c!) v_data, Tensor(d!) v_scale, Tensor(e!) lengths"


def quantize_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 payload of x's shape and float16 scales of x's shape without its last dimension.

    ``scale = fp16(max|x| / 127)`` computed in float32; ``q = round(x / scale)`` (ties to even) with the *rounded*
    scale, clamped to -127..127; q is 0 where the scale is 0.
    """
    wide = x.float()
    scale = (wide.abs().amax(-1) / INT8_MAX).to(torch.float16)
    divisor = scale.float().unsqueeze(-1)
    q = (wide / divisor).round_().clamp_(-INT8_MAX, INT8_MAX)
    return q.masked_fill_(divisor == 0, 0).to(torch.int8), scale


def _store(
    key: torch.Tensor,
    value: torch.Tensor,
    k_data: torch.Tensor,
    k_scale: torch.Tensor,
    v_data: torch.Tensor,
    v_scale: torch.Tensor,
    lengths: torch.Tensor,
) -> None:
    q, scale = quantize_int8(torch.stack((key, value)))  # in one go: for a single token the calls are what costs
    start, tokens = _groups.tokens_stored(lengths), key.shape[2]
    for i, (stored_q, stored_scale) in enumerate(((k_data, k_scale), (v_data, v_scale))):
        stored_q.narrow(2, start, tokens).copy_(q[i])
        stored_scale.narrow(2, start, tokens).copy_(scale[i])
    lengths += tokens


_op, kv_int8_append_reference = _append.define("kv_int8_append", STORAGE, _store)


def kv_int8_append(
    key: torch.Tensor,
    value: torch.Tensor,
    storage: Sequence[torch.Tensor],
    transform: _append.QKTransform = _append.NOTHING,
    query: torch.Tensor | None = None,
    *,
    reference: bool = False,
) -> torch.Tensor | None:
    """Appends tokens and counts them in the storage's ``lengths``.

    Args:
        key, value: ``(B, H_kv, q, D)``, any strides with a contiguous last dimension; fp16, bf16 (CPU also fp32). On
            CUDA D is a multiple of 8 up to 256.
        storage: that of :class:`hf_fastpath.caches.int8.Int8KVLayer`, which describes it, with room for the tokens.
        transform: what is done to the keys before they are quantized, and to the query.
        query: ``(B, H, q, D)``, strides alike; None: nothing is returned.
        reference: run the reference implementation, on any device.

    Returns the query transformed, ``(B, H, q, D)``, in memory as ``(B, q, H, D)``.
    """
    append = kv_int8_append_reference if reference else _op
    return _append.call(append, key, value, storage, transform, query)
