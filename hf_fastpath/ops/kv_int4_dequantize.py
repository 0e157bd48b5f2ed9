"""Tokens of an int4 cache back to floats: for later prompt chunks and for attention code that is not ours."""

from __future__ import annotations

import torch

from hf_fastpath.ops import _groups, _library
from hf_fastpath.ops.kv_int4_append import PACKED_TOKENS

SCHEMA = (
    "kv_int4_dequantize(Tensor data, Tensor params, Tensor tail, Tensor sinks, Tensor lengths, bool values, "
    "int start, Tensor(a!) out) -> ()"
)


def _unpack(data: torch.Tensor) -> torch.Tensor:
    """Two codes of each byte, the low half first, as float32 in a new last dimension."""
    return torch.stack([data & 15, data >> 4], dim=-1).float()


def expand_keys(data: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
    """Keys of whole groups as float32 ``(B, H, n, D)``; :class:`hf_fastpath.caches.int4.Int4KVLayer` has the layout."""
    scale, low = params.float().unsqueeze(4).unbind(3)
    return (_unpack(data).flatten(3).unflatten(2, (params.shape[2], -1)) * scale + low).flatten(2, 3)


def expand_values(data: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
    """Values alike."""
    q = _unpack(data).flatten(4).transpose(3, 4).flatten(2, 3)  # (B, H, n, D)
    scale, low = params.float().permute(3, 0, 1, 2, 5, 4).flatten(3, 4).unsqueeze(5)  # (B, H, n, parts, 1)
    return (q.unflatten(3, (scale.shape[3], -1)) * scale + low).flatten(3)


def kv_int4_dequantize_reference(
    data: torch.Tensor,
    params: torch.Tensor,
    tail: torch.Tensor,
    sinks: torch.Tensor,
    lengths: torch.Tensor,
    values: bool,
    start: int,
    out: torch.Tensor,
) -> None:
    stop, group, front = start + out.shape[2], tail.shape[2], sinks.shape[2]
    quantized = _groups.quantized_of(_groups.tokens_stored(lengths), group, front)
    from_sinks = sinks[:, :, start:stop]
    first, last = max(start - front, 0), max(stop - front, 0)  # behind the sinks
    groups, count = _groups.groups_of(first, min(last, quantized), group)
    out[:, :, : from_sinks.shape[2]] = from_sinks
    if count:
        packed = PACKED_TOKENS if values else 1
        entries = slice(groups.start * group // packed, groups.stop * group // packed)
        whole = (expand_values if values else expand_keys)(data[:, :, entries], params[:, :, groups])
        out.narrow(2, from_sinks.shape[2], count).copy_(whole.narrow(2, first - groups.start * group, count))
    out[:, :, from_sinks.shape[2] + count :] = tail[:, :, max(first - quantized, 0) : max(last - quantized, 0)]


def _fake(
    data: torch.Tensor,
    params: torch.Tensor,
    tail: torch.Tensor,
    sinks: torch.Tensor,
    lengths: torch.Tensor,
    values: bool,
    start: int,
    out: torch.Tensor,
) -> None:
    return None


_op = _library.define(SCHEMA, kv_int4_dequantize_reference, _fake)


def kv_int4_dequantize(
    data: torch.Tensor,
    params: torch.Tensor,
    tail: torch.Tensor,
    sinks: torch.Tensor,
    lengths: torch.Tensor,
    values: bool,
    tokens: slice,
    dtype: torch.dtype,
    *,
    reference: bool = False,
) -> torch.Tensor:
    """The tokens ``tokens.start .. tokens.stop``, all of them stored, ``(B, H_kv, n, D)`` in ``dtype``.

    Args:
        data, params, tail, sinks: keys, or with ``values`` values, of the storage of
            :class:`hf_fastpath.caches.int4.Int4KVLayer`; lengths: its.
        reference: run the reference implementation, on any device.
    """
    shape = (*tail.shape[:2], tokens.stop - tokens.start, tail.shape[3])
    out = torch.empty(shape, dtype=dtype, device=data.device)
    (kv_int4_dequantize_reference if reference else _op)(data, params, tail, sinks, lengths, values, tokens.start, out)
    return out
