"""Quantize new keys and values to int8, one scale a token and head, and write them into the cache."""

from __future__ import annotations

import torch

from hf_fastpath.ops import _library

INT8_MAX = 127

SCHEMA = (
    "kv_int8_append(Tensor key, Tensor value, Tensor(a!) k_data, Tensor(b!) k_scale, Tensor(c!) v_data, "
    "Tensor(d!) v_scale, int start) -> ()"
)


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


def kv_int8_append_reference(
    key: torch.Tensor,
    value: torch.Tensor,
    k_data: torch.Tensor,
    k_scale: torch.Tensor,
    v_data: torch.Tensor,
    v_scale: torch.Tensor,
    start: int,
) -> None:
    q, scale = quantize_int8(torch.stack((key, value)))  # in one go: for a single token the calls are what costs
    length = key.shape[2]
    for i, (stored_q, stored_scale) in enumerate(((k_data, k_scale), (v_data, v_scale))):
        stored_q.narrow(2, start, length).copy_(q[i])
        stored_scale.narrow(2, start, length).copy_(scale[i])


def _fake(
    key: torch.Tensor,
    value: torch.Tensor,
    k_data: torch.Tensor,
    k_scale: torch.Tensor,
    v_data: torch.Tensor,
    v_scale: torch.Tensor,
    start: int,
) -> None:
    return None


_op = _library.define(SCHEMA, kv_int8_append_reference, _fake)


def kv_int8_append(
    key: torch.Tensor,
    value: torch.Tensor,
    k_data: torch.Tensor,
    k_scale: torch.Tensor,
    v_data: torch.Tensor,
    v_scale: torch.Tensor,
    start: int,
    *,
    reference: bool = False,
) -> None:
    """Writes tokens ``start .. start + q`` of the cache.

    Args:
        key, value: ``(B, H_kv, q, D)``, any strides with a contiguous last dimension; fp16, bf16 (CPU also fp32).
        k_data, v_data: int8 ``(B, H_kv, capacity, D)`` contiguous.
        k_scale, v_scale: float16 ``(B, H_kv, capacity)`` contiguous.
        reference: run the reference implementation, on any device.
    """
    append = kv_int8_append_reference if reference else _op
    append(key, value, k_data, k_scale, v_data, v_scale, start)
