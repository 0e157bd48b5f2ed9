"""How much attention each key gets from a prompt chunk: what the H2O cache chooses by."""

from __future__ import annotations

import torch

from hf_fastpath.ops import _library
from hf_fastpath.ops._slots import visible_tokens

QUERIES = 128  # at a time, so that the weights of a long chunk are never in memory as a whole

SCHEMA = (
    "attn_received(Tensor query, Tensor key, Tensor lse, Tensor positions, Tensor? mask, int start, float scaling) "
    "-> Tensor"
)


def attn_received_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    positions: torch.Tensor,
    mask: torch.Tensor | None,
    start: int,
    scaling: float,
) -> torch.Tensor:
    """Computed in float32, some queries at a time."""
    (batch, heads, tokens, _), kv_heads, old = query.shape, key.shape[1], key.shape[2] - query.shape[2]
    new = torch.arange(start, start + tokens, dtype=positions.dtype, device=positions.device)
    held = torch.cat([positions[:, :, :old], new.expand(batch, kv_heads, -1)], dim=2)
    group = heads // kv_heads
    received = torch.zeros((batch, heads, key.shape[2]), device=query.device)
    for begin in range(0, tokens, QUERIES):
        part = slice(begin, begin + QUERIES)
        visible = visible_tokens(held, new[part].long(), mask, part).repeat_interleave(group, 1)
        scores = query[:, :, part].float() * scaling @ key.float().repeat_interleave(group, 1).transpose(2, 3)
        sums = lse[:, :, part, None]
        visible &= sums > float("-inf")
        received += (scores - sums).exp().masked_fill(~visible, 0.0).sum(2)
    return received


def _fake(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    positions: torch.Tensor,
    mask: torch.Tensor | None,
    start: int,
    scaling: float,
) -> torch.Tensor:
    return query.new_empty((*query.shape[:2], key.shape[2]), dtype=torch.float32)


_op = _library.define(SCHEMA, attn_received_reference, _fake)


def attn_received(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    positions: torch.Tensor,
    mask: torch.Tensor | None,
    start: int,
    scaling: float,
    *,
    reference: bool = False,
) -> torch.Tensor:
    """The weights ``softmax(scaling * q K^T)`` summed over the queries, float32 ``(B, H, n)``.

    Args:
        query: ``(B, H, q, D)``, tokens ``start .. start + q``; key: ``(B, H_kv, n, D)``, n - q older ones and then
            those of the same tokens; both contiguous, fp16, bf16 (CPU also fp32). On CUDA D is a multiple of 8 up to
            256. H is a multiple of H_kv; head h reads KV head ``h // (H / H_kv)``.
        lse: float32 ``(B, H, q)``, the logarithms of the softmax's sums; minus infinity for a query that sees nothing
            or that does not count.
        positions: int32 ``(B, H_kv, >= n - q)``, the numbers of the older keys' tokens, all less than ``start``.
        mask: bool ``(B, q, >= start + q)``, True where a query may attend to a token by its number. None: all before a
            query and itself.
        reference: run the reference implementation, on any device.
    """
    run = attn_received_reference if reference else _op
    return run(query, key, lse, positions, mask, start, scaling)
