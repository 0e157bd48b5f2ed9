"""Attention of a prompt chunk over the H2O cache by torch's attention kernels, which leave out what decides what stays:
that is :func:`hf_fastpath.ops.attn_received`, from the logarithms of softmax's sums that they also give."""

from __future__ import annotations

import torch

from hf_fastpath.ops._attention import bias_of
from hf_fastpath.ops._slots import Slots, visible_tokens
from hf_fastpath.ops.attn_received import attn_received

# A bias, which is what the kernels take for a mask: so many bytes of it at a time.
TILE_BYTES = 64 * 2**20


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slots: Slots,
    held: torch.Tensor,
    start: int,
    mask: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``_attend()`` of :mod:`hf_fastpath.ops.attn_prefill_h2o`."""
    used, heads_of = slots.used(start), (key.shape[1], query.shape[1] // key.shape[1])
    old_keys, old_values = (
        (data[:, :, :used].float() * scale[:, :, :used, None].float()).to(query.dtype)  # exact, as far as it reaches
        for data, scale in ((slots.k_data, slots.k_scale), (slots.v_data, slots.v_scale))
    )
    query = query.contiguous()
    keys = torch.cat([old_keys, key], 2) if used else key.contiguous()
    if mask is None:
        out, lse = _flash(query, key, value, True, scaling)
        if used:
            out, lse = _add(out, lse, *_flash(query, old_keys, old_values, False, scaling))
    else:
        values = torch.cat([old_values, value], 2) if used else value
        out, lse = _attend_with_mask(query, keys, values, held, start, mask, scaling)
        own = mask[:, :, start : start + key.shape[2]].diagonal(dim1=1, dim2=2)
        lse = lse.masked_fill(~own[:, None], float("-inf"))  # what padding attends to says nothing
    received = attn_received(query, keys, lse.contiguous(), slots.positions, mask, start, scaling)
    return out, received.unflatten(1, heads_of).sum(2)


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention, and the logarithms of its sums, ``(B, H, q)``."""
    attend_to = torch.ops.aten._scaled_dot_product_flash_attention
    out, lse = attend_to(query, key, value, is_causal=causal, scale=scaling)[:2]
    return out, lse


def _add(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two sets of tokens from that over each."""
    total = torch.logaddexp(lse, other_lse)
    share, other_share = ((part - total).exp().unsqueeze(-1) for part in (lse, other_lse))
    return (out * share + other * other_share).to(out.dtype), total


def _attend_with_mask(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    held: torch.Tensor,
    start: int,
    mask: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Some queries at a time. What they see is the same for all heads when nothing is older than the chunk."""
    (batch, heads, tokens, _), (kv_heads, length) = query.shape, keys.shape[1:3]
    group, differing = heads // kv_heads, kv_heads if length > tokens else 1
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    rows = max(TILE_BYTES // (batch * differing * group * length * query.element_size()), 16)
    out = torch.empty_like(query)
    lse = query.new_empty((batch, heads, tokens), dtype=torch.float32)
    for begin in range(0, tokens, rows):
        part = slice(begin, min(begin + rows, tokens))
        number = torch.arange(start + part.start, start + part.stop, device=query.device)
        visible = visible_tokens(held[:, :differing], number, mask, part)  # (B, 1 or H_kv, part, n)
        if differing > 1:
            visible = visible.repeat_interleave(group, 1)
        bias = bias_of(visible, query)
        attend_by_bias = torch.ops.aten._scaled_dot_product_efficient_attention
        got, sums = attend_by_bias(query[:, :, part], keys, values, bias, True, scale=scaling)[:2]
        nothing = ~visible.any(-1)  # (B, 1 or H, part)
        out[:, :, part] = got.masked_fill(nothing.unsqueeze(-1), 0.0)
        lse[:, :, part] = sums[..., : len(number)].masked_fill(nothing, float("-inf"))  # the kernel pads it
    return out, lse
