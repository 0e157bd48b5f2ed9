"""Attention of one new token a row over an fp8 KV cache: E4M3 groups, then the full-precision tail."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from hf_fastpath.ops import _groups, _library
from hf_fastpath.ops._attention import Expanded, decode, tiles
from hf_fastpath.ops.kv_fp8_append import GROUP_TOKENS

SCHEMA = (
    "attn_decode_fp8(Tensor query, Tensor k_data, Tensor k_scale, Tensor k_tail, Tensor v_data, Tensor v_scale, "
    "Tensor v_tail, Tensor lengths, Tensor(a!)? tickets, Tensor? mask, float scaling, int window, float softcap, "
    "Tensor? sinks) -> Tensor"
)


def _expand(
    length: int,
    k_data: torch.Tensor,
    k_scale: torch.Tensor,
    k_tail: torch.Tensor,
    v_data: torch.Tensor,
    v_scale: torch.Tensor,
    v_tail: torch.Tensor,
) -> Expanded:
    keys, k_scales = _side(k_data, k_scale, k_tail, length)
    values, v_scales = _side(v_data, v_scale, v_tail, length)
    return Expanded(keys, values, k_scales, v_scales)


def _side(
    data: torch.Tensor, scale: torch.Tensor, tail: torch.Tensor, length: int
) -> tuple[Iterator[torch.Tensor], torch.Tensor]:
    """Keys or values in tiles, float32 but not yet scaled, and the scale of each token, 1 for the latest ones."""
    quantized = _groups.quantized_of(length, GROUP_TOKENS)
    parts = [data[:, :, tile] for tile in tiles(quantized)] + [tail[:, :, : length - quantized]]
    scales = scale.new_ones((*scale.shape[:2], length))
    scales[:, :, :quantized] = scale[:, :, : quantized // GROUP_TOKENS].repeat_interleave(GROUP_TOKENS, dim=2)
    return (part.float() for part in parts), scales


def attn_decode_fp8_reference(
    query: torch.Tensor,
    k_data: torch.Tensor,
    k_scale: torch.Tensor,
    k_tail: torch.Tensor,
    v_data: torch.Tensor,
    v_scale: torch.Tensor,
    v_tail: torch.Tensor,
    lengths: torch.Tensor,
    tickets: torch.Tensor | None,
    mask: torch.Tensor | None,
    scaling: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Computed in float32; keys and values are expanded tile by tile."""
    storage = (k_data, k_scale, k_tail, v_data, v_scale, v_tail, lengths)
    return decode(_expand, query, storage, mask, scaling, window, softcap, sinks)


def _fake(
    query: torch.Tensor,
    k_data: torch.Tensor,
    k_scale: torch.Tensor,
    k_tail: torch.Tensor,
    v_data: torch.Tensor,
    v_scale: torch.Tensor,
    v_tail: torch.Tensor,
    lengths: torch.Tensor,
    tickets: torch.Tensor | None,
    mask: torch.Tensor | None,
    scaling: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    return query.new_empty(query.shape)


_op = _library.define(SCHEMA, attn_decode_fp8_reference, _fake)


def attn_decode_fp8(
    query: torch.Tensor,
    storage: Sequence[torch.Tensor],
    mask: torch.Tensor | None,
    scaling: float,
    *,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    tickets: torch.Tensor | None = None,
    reference: bool = False,
) -> torch.Tensor:
    """``softmax(scaling * q K^T) V`` over the tokens that are stored, ``(B, H, D)`` in ``query.dtype``.

    Args:
        query: ``(B, H, D)`` contiguous; fp16, bf16 (CPU also fp32). H is a multiple of H_kv; head h reads KV head
            ``h // (H / H_kv)``. On CUDA D is a multiple of 16 up to 256.
        storage: that of :class:`hf_fastpath.caches.fp8.Fp8KVLayer`, which describes it.
        mask, scaling, window, softcap, sinks, tickets, reference: see :func:`attn_decode_int8`, as for what is
            deterministic.
    """
    attend: Any = attn_decode_fp8_reference if reference else _op
    return attend(query, *storage, tickets, mask, scaling, window, softcap, sinks)
