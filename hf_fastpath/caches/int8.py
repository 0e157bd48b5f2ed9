"""The INT8 cache: int8 payload with one float16 scale a token and head."""

from __future__ import annotations

import torch
from transformers.configuration_utils import PreTrainedConfig

from hf_fastpath.caches.base import FastCache, FastLayer
from hf_fastpath.caches.lazy import LazyKV
from hf_fastpath.caches.rotation import rotate
from hf_fastpath.errors import Unsupported
from hf_fastpath.heuristics import attn_decode_int8_supports
from hf_fastpath.ops import kv_int8_append, kv_int8_dequantize
from hf_fastpath.runtime import require_device, why_no_kernels


def why_head_dim_unsupported(head_dim: int) -> str:
    """Why the decode kernel does not take a head size; "" when it does. The reference takes any."""
    if attn_decode_int8_supports(head_dim):
        return ""
    return (
        f"the int8 KV cache on CUDA needs a head size that is a multiple of 16 up to 256, not {head_dim}; "
        "kv_cache='static' takes any"
    )


def _check_kernels(key: torch.Tensor) -> None:
    require_device(key.device)
    if not key.is_cuda:
        return
    reason = why_no_kernels(key.device, key.dtype) or why_head_dim_unsupported(key.shape[3])
    if reason:
        raise Unsupported(reason)


class Int8KVLayer(FastLayer):
    """``storage``: k_data (rotated), k_scale, v_data, v_scale; int8 ``(B, H_kv, capacity, D)``, scales fp16."""

    def __init__(self, initial_tokens: int = 0, fresh_prefill: bool = True, reference: bool = False) -> None:
        super().__init__(initial_tokens)
        self.fresh_prefill, self.reference = fresh_prefill, reference

    def allocate(self, key: torch.Tensor, value: torch.Tensor, capacity: int) -> list[torch.Tensor]:
        if not self.reference:
            _check_kernels(key)
        if key.shape != value.shape:
            raise Unsupported(
                f"the int8 KV cache needs keys and values of one shape, got {tuple(key.shape)} and "
                f"{tuple(value.shape)}; kv_cache='static' takes any"
            )
        shapes = [(*new.shape[:2], capacity) for new in (key, value)]
        storage = []
        for shape in shapes:
            storage.append(torch.zeros((*shape, key.shape[3]), dtype=torch.int8, device=key.device))
            storage.append(torch.zeros(shape, dtype=torch.float16, device=key.device))
        return storage

    def write(self, key: torch.Tensor, value: torch.Tensor, start: int) -> None:
        k_data, k_scale, v_data, v_scale = self.storage
        kv_int8_append(rotate(key), value, k_data, k_scale, v_data, v_scale, start, reference=self.reference)

    def read(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.fresh_prefill and key.shape[2] == self.length and key.shape[2] > 1:
            return key, value
        shape = (*key.shape[:2], self.length, key.shape[3])
        keys, values = (LazyKV(self, which, shape, key.dtype, key.device) for which in ("keys", "values"))
        return keys, values

    @classmethod
    def bytes_per_head(cls, head_dim: int, dtype: torch.dtype) -> int:
        return head_dim + 2

    def expand(self, which: str, length: int, dtype: torch.dtype) -> torch.Tensor:
        data, scale = self.storage[:2] if which == "keys" else self.storage[2:]
        stored = kv_int8_dequantize(data, scale, length, dtype, reference=self.reference)
        return rotate(stored) if which == "keys" else stored


class Int8KVCache(FastCache):
    """Keys and values as int8 with one float16 scale a token and head: 0.51 of the bytes of fp16 at head size 128.

    Keys are stored rotated (:mod:`hf_fastpath.caches.rotation`), which takes no memory and halves their error.

    With ``attn_implementation="fastpath"`` (what ``patch_model`` sets) decoding reads the int8 payload in a kernel.
    With any other implementation, so also on an unpatched model, each layer is expanded when its attention needs it.

    Args:
        config, max_cache_len: see :class:`FastCache`.
        fresh_prefill: let the first prompt chunk attend to its own unrounded keys and values (they are in memory
            anyway). With False it reads back what was stored, and one forward pass over a text has the numerics of
            decoding it token by token: what a perplexity that includes the cache's error needs.
        reference: run on the reference implementations (plain PyTorch, slow), also where the kernels cannot run.
    """

    layer_class = Int8KVLayer

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        max_cache_len: int = 0,
        fresh_prefill: bool = True,
        reference: bool = False,
    ) -> None:
        super().__init__(config, max_cache_len=max_cache_len, fresh_prefill=fresh_prefill, reference=reference)
