"""Attention of one new token a row over an int8 KV cache, which is read as int8 (never expanded as a whole).

The kernel splits the sequence and adds the parts by their maxima and sums ("Flash-Decoding", Dao et al., 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hf_fastpath.ops import _library
from hf_fastpath.ops._attention import Expanded, decode, in_tiles

SCHEMA = (
    "attn_decode_int8(Tensor query, Tensor k_data, Tensor k_scale, Tensor v_data, Tensor v_scale, Tensor lengths, "
    "Tensor(a!)? tickets, Tensor? mask, float scaling, int window, float softcap, Tensor? sinks) -> Tensor"
)


def _expand(
    length: int, k_data: torch.Tensor, k_scale: torch.Tensor, v_data: torch.Tensor, v_scale: torch.Tensor
) -> Expanded:
    scales = (scale[:, :, :length].float() for scale in (k_scale, v_scale))
    return Expanded(in_tiles(k_data, length), in_tiles(v_data, length), *scales)


def attn_decode_int8_reference(
    query: torch.Tensor,
    k_data: torch.Tensor,
    k_scale: torch.Tensor,
    v_data: torch.Tensor,
    v_scale: torch.Tensor,
    lengths: torch.Tensor,
    tickets: torch.Tensor | None,
    mask: torch.Tensor | None,
    scaling: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Computed in float32; keys and values are expanded tile by tile."""
    storage = (k_data, k_scale, v_data, v_scale, lengths)
    return decode(_expand, query, storage, mask, scaling, window, softcap, sinks)


def _fake(
    query: torch.Tensor,
    k_data: torch.Tensor,
    k_scale: torch.Tensor,
    v_data: torch.Tensor,
    v_scale: torch.Tensor,
    lengths: torch.Tensor,
    tickets: torch.Tensor | None,
    mask: torch.Tensor | None,
    scaling: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    return query.new_empty(query.shape)


_op = _library.define(SCHEMA, attn_decode_int8_reference, _fake)


def attn_decode_int8(
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
        storage: that of :class:`hf_fastpath.caches.int8.Int8KVLayer`, which describes it. On CUDA the capacity is a
            multiple of 16.
        mask: bool ``(B, n)``, last dimension contiguous, True where a token may be attended; tokens from n on may not.
            None: all may.
        scaling: what the products of query and keys are multiplied by.
        window: only the last so many tokens are attended ("sliding window"); 0: all.
        softcap: scores become ``softcap * tanh(score / softcap)``, as in Gemma 2; 0: they stay.
        sinks: float32 ``(H,)``, a logit for each head that takes part in the softmax and has no value, as in gpt-oss.
        tickets: int32 ``(n,)``, n at least B * H_kv, all 0, as they are when the call is done: what the CTAs of a row
            count themselves with. Calls on several streams must not share them. None: the op makes its own, which takes
            one more node of a CUDA graph.
        reference: run the reference implementation, on any device.

    A row whose tokens are all masked gives 0. The lengths are read on the GPU, so that a captured call goes on with
    what they are when it is replayed. Deterministic; how a row's tokens are divided depends on its length alone, so its
    bits depend neither on B nor on the capacity.
    """
    attend: Any = attn_decode_int8_reference if reference else _op
    return attend(query, *storage, tickets, mask, scaling, window, softcap, sinks)
