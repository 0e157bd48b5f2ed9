"""Attention of a prompt chunk over the H2O cache by torch's attention kernels, which leave out what decides what stays:
that is :func:`hf_fastpath.ops.attn_received`, from the logarithms of softmax's sums that they also give."""

from __future__ import annotations

import torch

from hf_fastpath.ops._slots import Slots, visible_tokens
from hf_fastpath.ops.attn_received import attn_received
from hf_fastpath.packing import ceil_div

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
    used = slots.used(start)
    old_keys, old_values = (
        (data[:, :, :used].float() * scale[:, :, :used, None].float()).to(query.dtype)  # exact, as far as it reaches
        for data, scale in ((slots.k_data, slots.k_scale), (slots.v_data, slots.v_scale))
    )
    keys, values = torch.cat([old_keys, key], 2), torch.cat([old_values, value], 2)
    query = query.contiguous()
    if mask is None and not used:
        attend_causally = torch.ops.aten._scaled_dot_product_flash_attention
        out, lse = attend_causally(query, keys, values, is_causal=True, scale=scaling)[:2]
    else:
        out, lse = _attend_with_mask(query, keys, values, held, start, mask, scaling)
    return out, attn_received(query, keys, lse.contiguous(), slots.positions, mask, start, scaling)


def _attend_with_mask(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    held: torch.Tensor,
    start: int,
    mask: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Some queries at a time, those of a KV head's group behind one another."""
    (batch, heads, tokens, _), (kv_heads, length) = query.shape, keys.shape[1:3]
    group = heads // kv_heads
    rows = max(TILE_BYTES // (batch * heads * length * query.element_size()), 16)
    out = torch.empty_like(query)
    lse = query.new_empty((batch, heads, tokens), dtype=torch.float32)
    for begin in range(0, tokens, rows):
        part = slice(begin, min(begin + rows, tokens))
        number = torch.arange(start + part.start, start + part.stop, device=query.device)
        visible = visible_tokens(held, number, mask, part)  # (B, H_kv, part, n)
        # The kernel wants a bias's rows aligned to 16 bytes, and minus infinity in a whole row makes it NaN.
        lowest = torch.finfo(query.dtype).min
        shape = (batch, kv_heads, group, len(number), ceil_div(length, 8) * 8)
        bias = query.new_full(shape, lowest)[..., :length].masked_fill_(visible.unsqueeze(2), 0.0).flatten(2, 3)
        folded = query[:, :, part].unflatten(1, (kv_heads, group)).flatten(2, 3)
        attend_by_bias = torch.ops.aten._scaled_dot_product_efficient_attention
        got, sums = attend_by_bias(folded, keys, values, bias, True, scale=scaling)[:2]
        nothing = ~visible.any(-1, keepdim=True).unsqueeze(2)  # (B, H_kv, 1, part, 1)
        got = got.unflatten(2, (group, -1)).masked_fill(nothing, 0.0)
        sums = sums[..., : folded.shape[2]].unflatten(2, (group, -1))  # the kernel pads it
        out[:, :, part] = got.flatten(1, 2)
        lse[:, :, part] = sums.masked_fill(nothing.squeeze(-1), float("-inf")).flatten(1, 2)
    return out, lse
