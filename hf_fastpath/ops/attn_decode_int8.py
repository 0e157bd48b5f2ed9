"""Attention of one new token a row over an int8 KV cache, which is read as int8 (never expanded as a whole).

The kernel splits the sequence and combines the parts by their maxima and sums ("Flash-Decoding", Dao et al., 2023).
"""

from __future__ import annotations

import torch

from hf_fastpath.ops import _library

# The CPU implementation expands this many tokens at a time: 1,024 tokens of a head stay in a core's L2 cache.
TILE_TOKENS = 1024

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
    batch, heads, dim = query.shape
    kv_heads = k_data.shape[1]
    tiles = [slice(start, min(start + TILE_TOKENS, length)) for start in range(0, length, TILE_TOKENS)]
    q = query.float().view(batch, kv_heads, heads // kv_heads, dim) * scaling
    parts = [q @ k_data[:, :, tile].float().transpose(2, 3) for tile in tiles]
    scores = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    scores *= k_scale[:, :, None, :length].float()
    if mask is None:
        weights = scores.softmax(-1)
    else:
        mask = mask[:, None, None, :length]
        weights = scores.masked_fill_(~mask, float("-inf")).softmax(-1)
        weights.masked_fill_(~mask.any(-1, keepdim=True), 0.0)  # softmax of nothing is NaN
    weights *= v_scale[:, :, None, :length].float()
    out = weights[..., tiles[0]] @ v_data[:, :, tiles[0]].float()
    for tile in tiles[1:]:
        out += weights[..., tile] @ v_data[:, :, tile].float()
    return out.view(batch, heads, dim).to(query.dtype)


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
