"""The INT8 cache: int8 payload with one float16 scale a token and head."""

from __future__ import annotations

import torch

from hf_fastpath.caches.compressed import CompressedCache, CompressedLayer
from hf_fastpath.caches.rotation import rotate
from hf_fastpath.heuristics import attn_decode_int8_supports
from hf_fastpath.ops import attn_decode_int8, kv_int8_append, kv_int8_dequantize


class Int8KVLayer(CompressedLayer):
    """``storage``: k_data (rotated), k_scale, v_data, v_scale; int8 ``(B, H_kv, capacity, D)``, scales fp16."""

    format = "int8"
    tokens_per_entry = (1, 1, 1, 1)

    @classmethod
    def why_no_kernel(cls, head_dim: int) -> str:
        if attn_decode_int8_supports(head_dim):
            return ""
        return (
            f"the int8 KV cache on CUDA needs a head size that is a multiple of 16 up to 256, not {head_dim}; "
            "kv_cache='static' takes any"
        )

    def new_storage(self, key: torch.Tensor, capacity: int) -> list[torch.Tensor]:
        data = (*key.shape[:2], capacity, key.shape[3])
        one = ((data, torch.int8), (data[:3], torch.float16))
        return [torch.zeros(shape, dtype=dtype, device=key.device) for shape, dtype in (*one, *one)]

    def write(self, key: torch.Tensor, value: torch.Tensor, start: int) -> None:
        k_data, k_scale, v_data, v_scale = self.storage
        kv_int8_append(rotate(key), value, k_data, k_scale, v_data, v_scale, start, reference=self.reference)

    def decode(self, query: torch.Tensor, mask: torch.Tensor | None, scaling: float) -> torch.Tensor:
        q = rotate(query).contiguous()  # as the stored keys are
        lengths = torch.full(self.storage[0].shape[:2], self.length, dtype=torch.int32, device=q.device)
        return attn_decode_int8(q, (*self.storage, lengths), mask, scaling, reference=self.reference)

    def bytes_per_head(self, head_dim: int, dtype: torch.dtype) -> float:
        return 2 * (head_dim + 2)

    def expand(self, which: str, length: int, dtype: torch.dtype) -> torch.Tensor:
        data, scale = self.storage[:2] if which == "keys" else self.storage[2:]
        stored = kv_int8_dequantize(data, scale, length, dtype, reference=self.reference)
        return rotate(stored) if which == "keys" else stored


class Int8KVCache(CompressedCache):
    """Keys and values as int8 with one float16 scale a token and head: 0.51 of the bytes of fp16 at head size 128.

    Keys are stored rotated (:mod:`hf_fastpath.caches.rotation`), which takes no memory and halves their error.

    Args:
        config, max_cache_len, fresh_prefill, reference: see :class:`CompressedCache`. With ``fresh_prefill=False`` one
            forward pass over a text has the numerics of decoding it token by token.
    """

    layer_class = Int8KVLayer
