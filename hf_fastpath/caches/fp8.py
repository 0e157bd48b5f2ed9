"""The FP8 cache: E4M3 in groups of 64 tokens that share a scale, and a full-precision tail until a group is full."""

from __future__ import annotations

import torch

from hf_fastpath.caches.compressed import CompressedCache
from hf_fastpath.caches.grouped import GroupedLayer
from hf_fastpath.ops._append import QKTransform
from hf_fastpath.ops.attn_decode_fp8 import attn_decode_fp8
from hf_fastpath.ops.kv_fp8_append import FP8, GROUP_TOKENS, kv_fp8_append
from hf_fastpath.ops.kv_fp8_dequantize import kv_fp8_dequantize


class Fp8KVLayer(GroupedLayer):
    """``storage``, k_* being for keys, all of them rotated, and v_* for values:

    k_data, v_data: E4M3 ``(B, H_kv, capacity, D)``; k_scale, v_scale: float32 ``(B, H_kv, capacity / 64)``, powers of
    two. Token t is ``data[t] * scale[t // 64]``, for the tokens that are quantized.

    k_tail, v_tail: ``(B, H_kv, 64, D)`` in the model's dtype, the others: token t is entry ``t % 64``.

    lengths: int32 ``(B, H_kv)``, tokens stored; the first ``lengths // 64 * 64`` of them are quantized.

    All are contiguous, a head's tokens behind one another: a tile of 64 tokens is 64 D bytes, aligned to 16, with one
    scale.
    """

    format = "fp8"
    group_tokens = GROUP_TOKENS
    tokens_per_entry = (1, GROUP_TOKENS, 0, 1, GROUP_TOKENS, 0, 0)

    def new_storage(self, key: torch.Tensor, capacity: int) -> list[torch.Tensor]:
        rows, dim = key.shape[:2], key.shape[3]
        one = (
            ((*rows, capacity, dim), FP8),
            ((*rows, capacity // GROUP_TOKENS), torch.float32),
            ((*rows, GROUP_TOKENS, dim), key.dtype),
        )
        kinds = (*one, *one, (rows, torch.int32))
        return [torch.zeros(shape, dtype=dtype, device=key.device) for shape, dtype in kinds]

    @property
    def tails(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.storage[2], self.storage[5]

    def append_grouped(
        self, key: torch.Tensor, value: torch.Tensor, transform: QKTransform, query: torch.Tensor | None
    ) -> torch.Tensor | None:
        return kv_fp8_append(key, value, self.storage, transform, query, reference=self.reference)

    def attend_stored(self, query: torch.Tensor, mask: torch.Tensor | None, scaling: float) -> torch.Tensor:
        return attn_decode_fp8(query, self.storage, mask, scaling, tickets=self.tickets, reference=self.reference)

    def bytes_per_head(self, head_dim: int, dtype: torch.dtype) -> float:
        return 2 * (head_dim + 4 / GROUP_TOKENS)

    def expand_stored(self, which: str, tokens: slice, dtype: torch.dtype) -> torch.Tensor:
        data, scale, tail = self.storage[:3] if which == "keys" else self.storage[3:6]
        return kv_fp8_dequantize(data, scale, tail, self.storage[-1], tokens, dtype, reference=self.reference)


class Fp8KVCache(CompressedCache):
    """Keys and values as E4M3, 64 tokens of a head sharing one scale: 0.50 of the bytes of fp16, and a tail.

    The latest tokens, those of a group that is not full yet (up to 63), are in full precision. Keys are stored rotated
    (:mod:`hf_fastpath.ops._rotation`): a third less error in the model's predictions.

    Args:
        config, max_cache_len, fresh_prefill, reference: see :class:`CompressedCache`.
    """

    layer_class = Fp8KVLayer
