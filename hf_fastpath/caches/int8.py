"""The INT8 cache: int8 payload with one float16 scale a token and head."""

from __future__ import annotations

import torch

from hf_fastpath.caches.compressed import CompressedCache, CompressedLayer
from hf_fastpath.ops._append import QKTransform
from hf_fastpath.ops.attn_decode_int8 import attn_decode_int8
from hf_fastpath.ops.attn_step_int8 import attn_step_int8
from hf_fastpath.ops.kv_int8_append import kv_int8_append
from hf_fastpath.ops.kv_int8_dequantize import kv_int8_dequantize


class Int8KVLayer(CompressedLayer):
    """``storage``, k_* being for keys, all of them rotated, and v_* for values:

    k_data, v_data: int8 ``(B, H_kv, capacity, D)``; k_scale, v_scale: float16 ``(B, H_kv, capacity)``. Token t is
    ``data[t] * scale[t]``.

    lengths: int32 ``(B, H_kv)``, tokens stored.

    All are contiguous; a token's data is aligned to 16 bytes when D is a multiple of 16.
    """

    format = "int8"
    tokens_per_entry = (1, 1, 1, 1, 0)

    def new_storage(self, key: torch.Tensor, capacity: int) -> list[torch.Tensor]:
        data = (*key.shape[:2], capacity, key.shape[3])
        one = ((data, torch.int8), (data[:3], torch.float16))
        kinds = (*one, *one, (key.shape[:2], torch.int32))
        return [torch.zeros(shape, dtype=dtype, device=key.device) for shape, dtype in kinds]

    def append(
        self, key: torch.Tensor, value: torch.Tensor, transform: QKTransform, query: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        return kv_int8_append(key, value, self.storage, transform, query, reference=self.reference)

    def attend_stored(self, query: torch.Tensor, mask: torch.Tensor | None, scaling: float) -> torch.Tensor:
        return attn_decode_int8(query, self.storage, mask, scaling, tickets=self.tickets, reference=self.reference)

    def step_counted(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        transform: QKTransform,
        mask: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        return attn_step_int8(
            *(query, key, value, self.storage, mask, scaling),
            transform=transform,
            tickets=self.tickets,
            reference=self.reference,
        )

    def bytes_per_head(self, head_dim: int, dtype: torch.dtype) -> float:
        return 2 * (head_dim + 2)

    def expand_stored(self, which: str, tokens: slice, dtype: torch.dtype) -> torch.Tensor:
        data, scale = self.storage[:2] if which == "keys" else self.storage[2:4]
        return kv_int8_dequantize(data, scale, tokens, dtype, reference=self.reference)


class Int8KVCache(CompressedCache):
    """Keys and values as int8 with one float16 scale a token and head: 0.51 of the bytes of fp16 at head size 128.

    Keys are stored rotated (:mod:`hf_fastpath.ops._rotation`), which takes no memory and halves their error.

    Args:
        config, max_cache_len, fresh_prefill, reference: see :class:`CompressedCache`. With ``fresh_prefill=False`` one
            forward pass over a text has the numerics of decoding it token by token.
    """

    layer_class = Int8KVLayer
