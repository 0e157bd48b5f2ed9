"""The full-precision cache: preallocated, written in place, read as views."""

from __future__ import annotations

import torch

from hf_fastpath.caches.base import FastCache
from hf_fastpath.caches.layer import FastLayer
from hf_fastpath.caches.lazy import LazyKV
from hf_fastpath.errors import Unsupported
from hf_fastpath.heuristics import attn_decode_supports, kv_append_supports
from hf_fastpath.ops._append import QKTransform
from hf_fastpath.ops.attn_decode_static import attn_decode_static
from hf_fastpath.ops.attn_step_static import attn_step_static
from hf_fastpath.ops.kv_static_append import kv_static_append
from hf_fastpath.runtime import is_capturing, why_no_kernels


class StaticKVLayer(FastLayer):
    """``storage``: keys and values as they come, ``(B, H_kv, capacity, D)`` in the model's dtype, and lengths, int32
    ``(B, H_kv)``, tokens stored.

    ``attends``: let the attention function ``"fastpath"`` decode in a kernel, which reads the lengths in GPU memory.
    """

    tokens_per_entry = (1, 1, 0)
    rotate_keys = False
    option_names = ("attends",)

    def __init__(self, initial_tokens: int = 0, attends: bool = False) -> None:
        super().__init__(initial_tokens)
        self.attends = attends

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.in_kernel = self._fits_kernel(key_states, value_states)
        super().lazy_initialization(key_states, value_states)

    def allocate(self, key: torch.Tensor, value: torch.Tensor, capacity: int) -> list[torch.Tensor]:
        data = [new.new_zeros((*new.shape[:2], capacity, new.shape[3])) for new in (key, value)]
        return [*data, torch.zeros(key.shape[:2], dtype=torch.int32, device=key.device)]

    @property
    def attends_in_kernel(self) -> bool:  # type: ignore[override]
        return self.attends

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
        return attn_step_static(
            *(query, key, value, self.storage, mask, scaling),
            transform=transform,
            tickets=self.tickets,
            reference=not self.in_kernel,
        )

    def read(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if key.shape[2] == self.length:
            return key, value  # a whole prompt: the same numbers, and gradients can flow
        if self.attends and self.in_kernel and key.shape[2] == 1 and attn_decode_supports(key.shape[3]):
            shape = (*key.shape[:2], self.length, key.shape[3])
            keys, values = (LazyKV(self, which, shape, key.dtype, key.device) for which in ("keys", "values"))
            return keys, values
        if is_capturing(key.device):
            raise Unsupported("a CUDA graph cannot hold a static KV cache that transformers attends to")
        return self.storage[0][:, :, : self.length], self.storage[1][:, :, : self.length]

    def decode(self, query: torch.Tensor, mask: torch.Tensor | None, scaling: float) -> torch.Tensor:
        """Attention of one new token a row, query ``(B, H, D)`` and result alike; mask: bool ``(B, length)``."""
        return attn_decode_static(query.contiguous(), self.storage, mask, scaling, tickets=self.tickets)

    def bytes_per_head(self, head_dim: int, dtype: torch.dtype) -> float:
        return 2 * head_dim * dtype.itemsize

    def expand(self, which: str, length: int, dtype: torch.dtype) -> torch.Tensor:
        return self.storage[0 if which == "keys" else 1][:, :, :length].to(dtype)


class StaticKVCache(FastCache):
    """Full-precision keys and values in preallocated tensors that are written in place.

    Unlike transformers' StaticCache it has no fixed maximum: it grows by blocks, by half at a time. Unlike DynamicCache
    it never copies the past for each new token. Attention over it is bit-identical to attention over a DynamicCache,
    unless ``attends``.

    Args:
        config, max_cache_len: see :class:`FastCache`.
        attends: with ``attn_implementation="fastpath"`` on a GPU, attention of a new token is a kernel of ours.
    """

    layer_class = StaticKVLayer
