"""Attention of one new token a row over an int4 KV cache: groups of 4-bit codes, then the full-precision tail."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from hf_fastpath.ops import _groups, _library
from hf_fastpath.ops._attention import Expanded, decode, tiles
from hf_fastpath.ops.kv_int4_append import PACKED_TOKENS
from hf_fastpath.ops.kv_int4_dequantize import expand_keys, expand_values

SCHEMA = (
    "attn_decode_int4(Tensor query, Tensor k_data, Tensor k_params, Tensor k_tail, Tensor k_sinks, Tensor v_data, "
    "Tensor v_params, Tensor v_tail, Tensor v_sinks, Tensor lengths, Tensor(a!)? tickets, Tensor? mask, float "
    "scaling, int window, float softcap, Tensor? sinks) -> Tensor"
)


def _expand(
    length: int,
    k_data: torch.Tensor,
    k_params: torch.Tensor,
    k_tail: torch.Tensor,
    k_sinks: torch.Tensor,
    v_data: torch.Tensor,
    v_params: torch.Tensor,
    v_tail: torch.Tensor,
    v_sinks: torch.Tensor,
) -> Expanded:
    return Expanded(
        _side(k_data, k_params, k_tail, k_sinks, length, False), _side(v_data, v_params, v_tail, v_sinks, length, True)
    )


def _side(
    data: torch.Tensor, params: torch.Tensor, tail: torch.Tensor, sinks: torch.Tensor, length: int, values: bool
) -> Iterator[torch.Tensor]:
    """Keys or values in tiles, float32, in the order of the tokens."""
    front, group = sinks.shape[2], tail.shape[2]
    quantized = _groups.quantized_of(length, group, front)
    tokens, expand = (PACKED_TOKENS, expand_values) if values else (1, expand_keys)
    yield sinks[:, :, :length].float()
    for tile in tiles(quantized):
        entries = slice(tile.start // tokens, tile.stop // tokens)
        yield expand(data[:, :, entries], params[:, :, tile.start // group : tile.stop // group])
    yield tail[:, :, : max(length - front - quantized, 0)].float()


def attn_decode_int4_reference(
    query: torch.Tensor,
    k_data: torch.Tensor,
    k_params: torch.Tensor,
    k_tail: torch.Tensor,
    k_sinks: torch.Tensor,
    v_data: torch.Tensor,
    v_params: torch.Tensor,
    v_tail: torch.Tensor,
    v_sinks: torch.Tensor,
    lengths: torch.Tensor,
    tickets: torch.Tensor | None,
    mask: torch.Tensor | None,
    scaling: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Computed in float32; keys and values are expanded tile by tile."""
    storage = (k_data, k_params, k_tail, k_sinks, v_data, v_params, v_tail, v_sinks, lengths)
    return decode(_expand, query, storage, mask, scaling, window, softcap, sinks)


def _fake(
    query: torch.Tensor,
    k_data: torch.Tensor,
    k_params: torch.Tensor,
    k_tail: torch.Tensor,
    k_sinks: torch.Tensor,
    v_data: torch.Tensor,
    v_params: torch.Tensor,
    v_tail: torch.Tensor,
    v_sinks: torch.Tensor,
    lengths: torch.Tensor,
    tickets: torch.Tensor | None,
    mask: torch.Tensor | None,
    scaling: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    return query.new_empty(query.shape)


_op = _library.define(SCHEMA, attn_decode_int4_reference, _fake)


def attn_decode_int4(
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
            ``h // (H / H_kv)``. On CUDA D is a multiple of 16 up to 256, and
            ``D / value_groups(D)`` one of 8.
        storage: that of :class:`hf_fastpath.caches.int4.Int4KVLayer`, which describes it.
        mask, scaling, window, softcap, sinks, tickets, reference: see :func:`attn_decode_int8`, as for what is
            deterministic.
    """
    attend: Any = attn_decode_int4_reference if reference else _op
    return attend(query, *storage, tickets, mask, scaling, window, softcap, sinks)
