"""The INT4 cache: keys rounded channel by channel along the sequence, values token by token, the latest tokens not."""

from __future__ import annotations

import torch
from transformers.configuration_utils import PreTrainedConfig

from hf_fastpath.caches.compressed import CompressedCache
from hf_fastpath.caches.grouped import GroupedLayer
from hf_fastpath.errors import Unsupported
from hf_fastpath.heuristics import attn_decode_int4_supports, attn_decode_supports
from hf_fastpath.ops._append import QKTransform
from hf_fastpath.ops.attn_decode_int4 import attn_decode_int4
from hf_fastpath.ops.kv_int4_append import PACKED_TOKENS, kv_int4_append, value_groups
from hf_fastpath.ops.kv_int4_dequantize import kv_int4_dequantize

GROUP_TOKENS = 64
GROUP_SIZES = (32, 64)
SINKS = 4


class Int4KVLayer(GroupedLayer):
    """``storage``, G being the tokens of a group (32 or 64), S those in front that are not quantized (``sinks``), and
    token ``S + t`` being quantized, in group ``g = t // G``:

    k_data: uint8 ``(B, H_kv, capacity, D / 2)``. Byte j of a token is channel 2 j in its low half and 2 j + 1 in its
    high one.

    k_params: float16 ``(B, H_kv, capacity / G, 2, D)``. Channel c of the key is ``q * params[g, 0, c] + params[g, 1,
    c]``: a product with a query needs its channels times ``params[g, 0]``, and one sum a group for ``params[g, 1]``.

    v_data: uint8 ``(B, H_kv, capacity / 8, D, 4)``, a 32-bit word for 8 tokens of a channel: byte j of word
    ``[t // 8, c]`` is token 2 j of the 8 in its low half and 2 j + 1 in its high one.

    v_params: float16 ``(B, H_kv, capacity / G, 2, P, G)``, the D channels being in P equal parts of at most 64:
    channel c of the value is ``q * params[g, 0, p, t % G] + params[g, 1, p, t % G]``, ``p = c // (D / P)``: a sum over
    tokens needs the weights of attention times ``params[g, 0, p]``, and one sum a part for ``params[g, 1, p]``.

    k_tail, v_tail: ``(B, H_kv, G, D)`` in the model's dtype, the tokens of the group that is not full yet: token
    ``S + t`` is entry ``t % G``. k_sinks, v_sinks: ``(B, H_kv, S, D)`` alike, the first tokens.

    lengths: int32 ``(B, H_kv)``, tokens stored; behind the sinks the first ``(lengths - S) // G * G`` are quantized.

    All are contiguous, a head's tokens behind one another; a group's part of each tensor is aligned to 16 bytes when D
    is a multiple of 8.
    """

    format = "int4"
    option_names = (*GroupedLayer.option_names, "group_tokens", "sinks", "rotate_keys")

    def __init__(
        self,
        initial_tokens: int = 0,
        fresh_prefill: bool = True,
        reference: bool = False,
        group_tokens: int = GROUP_TOKENS,
        sinks: int = SINKS,
        rotate_keys: bool = True,
    ) -> None:
        super().__init__(initial_tokens, fresh_prefill, reference)
        self.group_tokens, self.sinks, self.rotate_keys = group_tokens, sinks, rotate_keys

    @property
    def tokens_per_entry(self) -> tuple[int, ...]:  # type: ignore[override]
        return (1, self.group_tokens, 0, 0, PACKED_TOKENS, self.group_tokens, 0, 0, 0)

    def why_no_kernel(self, head_dim: int) -> str:
        part = head_dim // value_groups(head_dim)
        if attn_decode_int4_supports(head_dim) or not attn_decode_supports(head_dim):
            return super().why_no_kernel(head_dim)
        return (
            f"the int4 KV cache on CUDA needs a head size whose equal parts of at most 64 channels are multiples of 8 "
            f"channels, not {part} as of {head_dim}; kv_cache='int8' takes it"
        )

    def new_storage(self, key: torch.Tensor, capacity: int) -> list[torch.Tensor]:
        rows, dim, group = key.shape[:2], key.shape[3], self.group_tokens
        if dim % 2:
            raise Unsupported(f"the int4 KV cache needs an even head size, not {dim}")
        groups, parts = capacity // group, value_groups(dim)
        full = (((*rows, group, dim), key.dtype), ((*rows, self.sinks, dim), key.dtype))
        kinds = (
            ((*rows, capacity, dim // 2), torch.uint8),
            ((*rows, groups, 2, dim), torch.float16),
            *full,
            ((*rows, capacity // PACKED_TOKENS, dim, PACKED_TOKENS // 2), torch.uint8),
            ((*rows, groups, 2, parts, group), torch.float16),
            *full,
            (rows, torch.int32),
        )
        return [torch.zeros(shape, dtype=dtype, device=key.device) for shape, dtype in kinds]

    @property
    def tails(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.storage[2], self.storage[6]

    def append_grouped(
        self, key: torch.Tensor, value: torch.Tensor, transform: QKTransform, query: torch.Tensor | None
    ) -> torch.Tensor | None:
        return kv_int4_append(key, value, self.storage, transform, query, reference=self.reference)

    def attend_stored(self, query: torch.Tensor, mask: torch.Tensor | None, scaling: float) -> torch.Tensor:
        return attn_decode_int4(query, self.storage, mask, scaling, tickets=self.tickets, reference=self.reference)

    def bytes_per_head(self, head_dim: int, dtype: torch.dtype) -> float:
        return head_dim + 4 * head_dim / self.group_tokens + 4 * value_groups(head_dim)

    def expand_stored(self, which: str, tokens: slice, dtype: torch.dtype) -> torch.Tensor:
        values = which == "values"
        data, params, tail, sinks = self.storage[4:8] if values else self.storage[:4]
        stored = (data, params, tail, sinks, self.storage[-1])
        return kv_int4_dequantize(*stored, values, tokens, dtype, reference=self.reference)


class Int4KIVICache(CompressedCache):
    """Keys and values as asymmetric 4-bit integers: 0.28 of the bytes of fp16, and a tail.

    Keys share a scale along the sequence, channel by channel, values along the channels of a token (KIVI, Liu et al.,
    2024). The latest tokens, those of a group that is not full yet, are in full precision.

    Args:
        config, max_cache_len, fresh_prefill, reference: see :class:`CompressedCache`.
        group_tokens: tokens of a group, 32 or 64. 32 takes 0.31 of the bytes of fp16, and was no more accurate when
            measured (README.md, "Accuracy").
        sinks: so many of the first tokens stay in full precision. Most of attention goes to the first token, so its
            error counts most (Xiao et al., 2024, "Efficient Streaming Language Models with Attention Sinks"). In a
            left-padded row these are padding.
        rotate_keys: rotate keys before they are quantized (:mod:`hf_fastpath.ops._rotation`).
    """

    layer_class = Int4KVLayer

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        max_cache_len: int = 0,
        fresh_prefill: bool = True,
        reference: bool = False,
        group_tokens: int = GROUP_TOKENS,
        sinks: int = SINKS,
        rotate_keys: bool = True,
    ) -> None:
        if group_tokens not in GROUP_SIZES:
            raise ValueError(f"group_tokens={group_tokens!r}: allowed are {', '.join(map(str, GROUP_SIZES))}")
        if sinks < 0:
            raise ValueError(f"sinks={sinks}: must be 0 or more")
        super().__init__(
            config,
            max_cache_len=max_cache_len,
            fresh_prefill=fresh_prefill,
            reference=reference,
            group_tokens=group_tokens,
            sinks=sinks,
            rotate_keys=rotate_keys,
        )
