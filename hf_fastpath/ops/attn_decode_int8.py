"""Attention of one new token a row over an int8 KV cache, which is read as int8 (never expanded as a whole).

The kernel splits the sequence and combines the parts by their maxima and sums ("Flash-Decoding", Dao et al., 2023).
"""

from __future__ import annotations

import torch

from hf_fastpath.ops import _library
from hf_fastpath.ops._attention import attend_tiles, tiles

SCHEMA = (
    "attn_decode_int8(Tensor query, Tensor k_data, Tensor k_scale, Tensor v_data, Tensor v_scale, Tensor? mask, "
    "int length, float scaling) -> Tensor"
)


def attn_decode_int8_reference(
    query: torch.Tensor,
    k_data: torch.Tensor,
    k_scale: torch.Tensor,
    v_data: torch.Tensor,
    v_scale: torch.Tensor,
    mask: torch.Tensor | None,
    length: int,
    scaling: float,
) -> torch.Tensor:
    """Computed in float32; keys and values are expanded tile by tile. A row whose tokens are all masked gives 0."""
    parts = tiles(length)
    keys = (k_data[:, :, tile].float() for tile in parts)
    values = (v_data[:, :, tile].float() for tile in parts)
    scales = (scale[:, :, :length].float() for scale in (k_scale, v_scale))
    return attend_tiles(query, k_data.shape[1], keys, values, mask, scaling, *scales)


def _fake(
    query: torch.Tensor,
    k_data: torch.Tensor,
    k_scale: torch.Tensor,
    v_data: torch.Tensor,
    v_scale: torch.Tensor,
    mask: torch.Tensor | None,
    length: int,
    scaling: float,
) -> torch.Tensor:
    return query.new_empty(query.shape)


_op = _library.define(SCHEMA, attn_decode_int8_reference, _fake)


def attn_decode_int8(
    query: torch.Tensor,
    k_data: torch.Tensor,
    k_scale: torch.Tensor,
    v_data: torch.Tensor,
    v_scale: torch.Tensor,
    mask: torch.Tensor | None,
    length: int,
    scaling: float,
    *,
    reference: bool = False,
) -> torch.Tensor:
    """``softmax(scaling * q K^T) V`` over the first ``length`` tokens, ``(B, H, D)`` in ``query.dtype``.

    Args:
        query: ``(B, H, D)`` contiguous; fp16, bf16 (CPU also fp32). H is a multiple of H_kv; head h reads KV head
            ``h // (H / H_kv)``. On CUDA D is a multiple of 16 up to 256.
        k_data, v_data: int8 ``(B, H_kv, capacity, D)``; k_scale, v_scale: float16 ``(B, H_kv, capacity)``; contiguous.
        mask: bool ``(B, >= length)``, last dimension contiguous, True where a token may be attended; None: all.
        reference: run the reference implementation, on any device.

    Deterministic; how the sequence is split depends on ``length`` alone, so a row's bits do not depend on B.
    """
    attend = attn_decode_int8_reference if reference else _op
    return attend(query, k_data, k_scale, v_data, v_scale, mask, length, scaling)
