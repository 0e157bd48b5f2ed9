"""The full-precision cache: preallocated, written in place, read as views."""

from __future__ import annotations

import torch

from hf_fastpath.caches.base import FastCache, FastLayer


class StaticKVLayer(FastLayer):
    """Keys and values as they come, in two tensors ``(B, H_kv, capacity, D)``."""

    tokens_per_entry = (1, 1)

    def allocate(self, key: torch.Tensor, value: torch.Tensor, capacity: int) -> list[torch.Tensor]:
        return [new.new_zeros((*new.shape[:2], capacity, new.shape[3])) for new in (key, value)]

    def write(self, key: torch.Tensor, value: torch.Tensor, start: int) -> None:
        self.storage[0][:, :, start : self.length] = key
        self.storage[1][:, :, start : self.length] = value

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
