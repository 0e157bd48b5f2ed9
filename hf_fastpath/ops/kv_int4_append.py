"""Write new keys and values into the int4 cache: into its full-precision tail, and as 4-bit integers when a group of
tokens is full.

Keys share a scale along the sequence, channel by channel, since a few of their channels are far larger than the others
and stay so; values share one along the channels of a token (Liu et al., 2024, "KIVI: A Tuning-Free Asymmetric 2bit
Quantization for KV Cache").
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hf_fastpath.ops import _append, _groups

INT4_MAX = 15
VALUE_CHANNELS = 64  # at most so many channels of a value share a scale
PACKED_TOKENS = 8  # tokens of a value's channel in one 32-bit word

STORAGE = (
    "Tensor(a!) k_data, Tensor(b!) k_params, Tensor(c!) k_tail, Tensor(d!) k_sinks, Tensor(e!) v_data, "
    "Tensor(f!) v_params, Tensor(g!) v_tail, Tensor(h!) v_sinks, Tensor(i!) lengths"
)


def value_groups(head_dim: int) -> int:
    """Into how many equal parts the channels of a value are divided, each with a scale: as few as can be."""
    parts = -(-head_dim // VALUE_CHANNELS)
    while head_dim % parts:
        parts += 1
    return parts


def quantize_int4(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes 0..15 (uint8) of x's shape; float16 scale and minimum of x's shape without its last dimension.

    ``scale = fp16((max - min) / 15)``; ``q = round((x - fp16(min)) / scale)``, ties to even, clamped; 0 where the scale
    is. So ``x`` is about ``q * scale + min``.
    """
    wide = x.float()
    low, high = wide.aminmax(dim=-1)
    scale, low = ((high - low) / INT4_MAX).half(), low.half()
    divisor = scale.float().unsqueeze(-1)
    q = ((wide - low.float().unsqueeze(-1)) / divisor).round_().clamp_(0, INT4_MAX)
    return q.masked_fill_(divisor == 0, 0).to(torch.uint8), scale, low


def quantize_keys(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys ``(B, H, n, D)``, n a multiple of the group: packed ``(B, H, n, D / 2)`` and parameters
    ``(B, H, n / group, 2, D)``, as :class:`hf_fastpath.caches.int4.Int4KVLayer` stores them."""
    q, scale, low = quantize_int4(x.unflatten(2, (-1, group)).transpose(3, 4))
    q = q.transpose(3, 4).flatten(2, 3).unflatten(3, (-1, 2))
    return q[..., 0] | q[..., 1] << 4, torch.stack([scale, low], dim=3)


def quantize_values(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values alike: packed ``(B, H, n / 8, D, 4)`` and parameters ``(B, H, n / group, 2, parts, group)``."""
    q, scale, low = quantize_int4(x.unflatten(3, (value_groups(x.shape[3]), -1)))
    q = q.flatten(3, 4).unflatten(2, (-1, PACKED_TOKENS // 2, 2)).movedim(5, 3)  # (B, H, n / 8, D, 4, 2)
    params = torch.stack([scale, low], dim=2).unflatten(3, (-1, group))  # (B, H, 2, n / group, group, parts)
    return q[..., 0] | q[..., 1] << 4, params.permute(0, 1, 3, 2, 5, 4)


def _store(
    key: torch.Tensor,
    value: torch.Tensor,
    k_data: torch.Tensor,
    k_params: torch.Tensor,
    k_tail: torch.Tensor,
    k_sinks: torch.Tensor,
    v_data: torch.Tensor,
    v_params: torch.Tensor,
    v_tail: torch.Tensor,
    v_sinks: torch.Tensor,
    lengths: torch.Tensor,
) -> None:
    stored, group, sinks = _groups.tokens_stored(lengths), k_tail.shape[2], k_sinks.shape[2]
    lengths += key.shape[2]
    key, value = _groups.take_sinks(key, k_sinks, stored), _groups.take_sinks(value, v_sinks, stored)
    first, start = _groups.quantized_of(stored, group, sinks), max(stored - sinks, 0)
    full_keys, full_values = _groups.tail_append(key, k_tail, start), _groups.tail_append(value, v_tail, start)
    if full_keys.shape[2]:
        stop = first + full_keys.shape[2]
        groups = slice(first // group, stop // group)
        k_data[:, :, first:stop], k_params[:, :, groups] = quantize_keys(full_keys, group)
        words = slice(first // PACKED_TOKENS, stop // PACKED_TOKENS)
        v_data[:, :, words], v_params[:, :, groups] = quantize_values(full_values, group)


_op, kv_int4_append_reference = _append.define("kv_int4_append", STORAGE, _store)


def kv_int4_append(
    key: torch.Tensor,
    value: torch.Tensor,
    storage: Sequence[torch.Tensor],
    transform: _append.QKTransform = _append.NOTHING,
    query: torch.Tensor | None = None,
    *,
    reference: bool = False,
) -> torch.Tensor | None:
    """Appends tokens, quantizes the groups that they fill, and counts both in the storage's ``lengths``.

    Args:
        key, value: ``(B, H_kv, q, D)``, any strides with a contiguous last dimension; fp16, bf16 (CPU also fp32);
            magnitudes up to 65,504, float16's largest.
        storage: that of :class:`hf_fastpath.caches.int4.Int4KVLayer`, which describes it, with room for the tokens.
        transform: what is done to the keys before they are stored, and to the query.
        query: ``(B, H, q, D)``, strides alike; None: nothing is returned.
        reference: run the reference implementation, on any device.

    Returns the query transformed, ``(B, H, q, D)``, in memory as ``(B, q, H, D)``.
    """
    append = kv_int4_append_reference if reference else _op
    return _append.call(append, key, value, storage, transform, query)
