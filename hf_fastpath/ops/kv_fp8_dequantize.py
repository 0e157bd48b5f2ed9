"""Tokens of an fp8 cache back to floats: for later prompt chunks and for attention code that is not ours."""

from __future__ import annotations

import torch

from hf_fastpath.ops import _groups, _library
from hf_fastpath.ops.kv_fp8_append import GROUP_TOKENS
from hf_fastpath.packing import ceil_div

SCHEMA = "kv_fp8_dequantize(Tensor data, Tensor scale, Tensor tail, Tensor lengths, Tensor(a!) out) -> ()"


def expand_fp8_groups(data: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """E4M3 ``(B, H, n, D)`` with float32 scales ``(B, H, n / 64)`` as float32, exactly."""
    return (data.float().unflatten(2, (-1, GROUP_TOKENS)) * scale[..., None, None]).flatten(2, 3)


def kv_fp8_dequantize_reference(
    data: torch.Tensor, scale: torch.Tensor, tail: torch.Tensor, lengths: torch.Tensor, out: torch.Tensor
) -> None:
    length = out.shape[2]
    quantized = min(_groups.quantized_of(_groups.tokens_stored(lengths), GROUP_TOKENS), length)
    groups = ceil_div(quantized, GROUP_TOKENS)
    whole = expand_fp8_groups(data[:, :, : groups * GROUP_TOKENS], scale[:, :, :groups])
    out[:, :, :quantized] = whole[:, :, :quantized]
    out[:, :, quantized:] = tail[:, :, : length - quantized]


def _fake(
    data: torch.Tensor, scale: torch.Tensor, tail: torch.Tensor, lengths: torch.Tensor, out: torch.Tensor
) -> None:
    return None


_op = _library.define(SCHEMA, kv_fp8_dequantize_reference, _fake)


def kv_fp8_dequantize(
    data: torch.Tensor,
    scale: torch.Tensor,
    tail: torch.Tensor,
    lengths: torch.Tensor,
    length: int,
    dtype: torch.dtype,
    *,
    reference: bool = False,
) -> torch.Tensor:
    """The first ``length`` tokens, at most as many as are stored, ``(B, H_kv, length, D)`` in ``dtype``.

    Args:
        data, scale, tail: keys or values of the storage of :class:`hf_fastpath.caches.fp8.Fp8KVLayer`; lengths: its.
        reference: run the reference implementation, on any device.
    """
    out = torch.empty((data.shape[0], data.shape[1], length, data.shape[3]), dtype=dtype, device=data.device)
    (kv_fp8_dequantize_reference if reference else _op)(data, scale, tail, lengths, out)
    return out
