"""The full-precision cache: preallocated, written in place, read as views."""

from __future__ import annotations

import torch

from hf_fastpath.caches.base import FastCache, FastLayer
from hf_fastpath.heuristics import kv_append_supports
from hf_fastpath.ops._append import QKTransform
from hf_fastpath.ops.attn_decode_static import attn_decode_static
from hf_fastpath.ops.kv_static_append import kv_static_append
from hf_fastpath.runtime import why_no_kernels


class StaticKVLayer(FastLayer):
    """``storage``: keys and values as they come, ``(B, H_kv, capacity, D)`` in the model's dtype, and lengths, int32
    ``(B, H_kv)``, tokens stored."""

    tokens_per_entry = (1, 1, 0)
    rotate_keys = False

    def allocate(self, key: torch.Tensor, value: torch.Tensor, capacity: int) -> list[torch.Tensor]:
        self.in_kernel = self._fits_kernel(key, value)
        data = [new.new_zeros((*new.shape[:2], capacity, new.shape[3])) for new in (key, value)]
        return [*data, torch.zeros(key.shape[:2], dtype=torch.int32, device=key.device)]

    @staticmethod
    def _fits_kernel(key: torch.Tensor, value: torch.Tensor) -> bool:
        """Whether the kernel appends. Else torch does, as it does on the CPU: the cache is for any model on any GPU."""
        fits = key.shape == value.shape and kv_append_supports(key.shape[3])
        return fits and key.is_cuda and not why_no_kernels(key.device, key.dtype)

    def write(self, key: torch.Tensor, value: torch.Tensor) -> None:
        kv_static_append(key, value, self.storage, reference=not self.in_kernel)

    def step(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        transform: QKTransform,
        mask: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        """As :meth:`hf_fastpath.caches.compressed.CompressedLayer.step`; on a GPU for head sizes that
        :func:`hf_fastpath.heuristics.attn_decode_supports`."""
        self._admit(key, value)
        ready = kv_static_append(key, value, self.storage, transform, query, reference=not self.in_kernel)
        assert ready is not None
        return attn_decode_static(ready.squeeze(2), self.storage, mask, scaling, reference=not self.in_kernel)

    def read(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if key.shape[2] == self.length:
            return key, value  # a whole prompt: the same numbers, and gradients can flow
        return self.storage[0][:, :, : self.length], self.storage[1][:, :, : self.length]

    def bytes_per_head(self, head_dim: int, dtype: torch.dtype) -> float:
        return 2 * head_dim * dtype.itemsize

    def expand(self, which: str, length: int, dtype: torch.dtype) -> torch.Tensor:
        return self.storage[0 if which == "keys" else 1][:, :, :length].to(dtype)


class StaticKVCache(FastCache):
    """Full-precision keys and values in preallocated tensors that are written in place.

    Unlike transformers' StaticCache it has no fixed maximum: it grows by blocks, by half at a time. Unlike DynamicCache
    it never copies the past for each new token. Attention over it is bit-identical to attention over a DynamicCache.
    """

    layer_class = StaticKVLayer
