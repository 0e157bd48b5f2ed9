"""Tokens of an fp8 cache back to floats: for later prompt chunks and for attention code that is not ours."""

from __future__ import annotations

import torch

from hf_fastpath.ops import _groups, _library
from hf_fastpath.ops.kv_fp8_append import GROUP_TOKENS

SCHEMA = "kv_fp8_dequantize(Tensor data, Tensor scale, Tensor tail, Tensor lengths, int start, Tensor(a!) out) -> ()"


def expand_fp8_groups(data: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """E4M3 ``(B, H, n, D)`` with float32 scales ``(B, H, n / 64)`` as float32, exactly."""
    return (data.float().unflatten(2, (-1, GROUP_TOKENS)) * scale[..., None, None]).flatten(2, 3)


def kv_fp8_dequantize_reference(
    data: torch.Tensor,
    scale: torch.Tensor,
    tail: torch.Tensor,
    lengths: torch.Tensor,
    start: int,
    out: torch.Tensor,
) -> None:
    stop = start + out.shape[2]
    quantized = _groups.quantized_of(_groups.tokens_stored(lengths), GROUP_TOKENS)
    groups, count = _groups.groups_of(start, min(stop, quantized), GROUP_TOKENS)
    if count:
        entries = slice(groups.start * GROUP_TOKENS, groups.stop * GROUP_TOKENS)
        whole = expand_fp8_groups(data[:, :, entries], scale[:, :, groups])
        out[:, :, :count] = whole.narrow(2, start - entries.start, count)
    out[:, :, count:] = tail[:, :, max(start - quantized, 0) : max(stop - quantized, 0)]


def _fake(
    data: torch.Tensor,
    scale: torch.Tensor,
    tail: torch.Tensor,
    lengths: torch.Tensor,
    start: int,
    out: torch.Tensor,
) -> None:
    return None


_op = _library.define(SCHEMA, kv_fp8_dequantize_reference, _fake)


def kv_fp8_dequantize(
    data: torch.Tensor,
    scale: torch.Tensor,
    tail: torch.Tensor,
    lengths: torch.Tensor,
    tokens: slice,
    dtype: torch.dtype,
    *,
    reference: bool = False,
) -> torch.Tensor:
    """The tokens ``tokens.start .. tokens.stop``, all of them stored, ``(B, H_kv, n, D)`` in ``dtype``.

    Args:
        data, scale, tail: keys or values of the storage of :class:`hf_fastpath.caches.fp8.Fp8KVLayer`; lengths: its.
        reference: run the reference implementation, on any device.
    """
    shape = (*data.shape[:2], tokens.stop - tokens.start, data.shape[3])
    out = torch.empty(shape, dtype=dtype, device=data.device)
    (kv_fp8_dequantize_reference if reference else _op)(data, scale, tail, lengths, tokens.start, out)
    return out
