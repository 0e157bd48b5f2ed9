"""What the compressed formats share: the attention function reads what is stored, and any other code a tensor that is
expanded when somebody computes with it."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from transformers.configuration_utils import PreTrainedConfig

from hf_fastpath.caches.base import FastCache
from hf_fastpath.caches.chunks import attend_in_tiles
from hf_fastpath.caches.layer import FastLayer
from hf_fastpath.caches.lazy import LazyKV
from hf_fastpath.errors import Unsupported
from hf_fastpath.heuristics import attn_decode_supports
from hf_fastpath.ops._append import NOTHING, ROTATED, QKTransform
from hf_fastpath.ops._rotation import rotate
from hf_fastpath.runtime import require_device, why_no_kernels


class CompressedLayer(FastLayer):
    """A layer whose ``update()`` returns :class:`LazyKV` handles, and which attends by itself (:meth:`decode`).

    ``format``: its name in ``FastpathConfig.kv_cache``, for messages. ``attends_chunks``: whether all attention has to
    be its own (``attend()``), of several tokens too; otherwise only that of one new token a row is.
    """

    format: str
    attends_chunks = False
    option_names: tuple[str, ...] = ("fresh_prefill", "reference")
    rotate_keys = True  # whether keys are stored rotated (hf_fastpath.ops._rotation)

    def __init__(self, initial_tokens: int = 0, fresh_prefill: bool = True, reference: bool = False) -> None:
        super().__init__(initial_tokens)
        self.fresh_prefill, self.reference = fresh_prefill, reference

    @property
    def attends_in_kernel(self) -> bool:  # type: ignore[override]
        return not self.reference

    def why_no_kernel(self, head_dim: int) -> str:
        """Why there are no CUDA kernels for this layer and a head size; "" when there are. The references take any."""
        if attn_decode_supports(head_dim):
            return ""
        return (
            f"the {self.format} KV cache on CUDA needs a head size that is a multiple of 16 up to 256, not {head_dim}; "
            "kv_cache='static' takes any"
        )

    @abstractmethod
    def new_storage(self, key: torch.Tensor, capacity: int) -> list[torch.Tensor]:
        """Empty storage for keys and values of the shape (but ``capacity`` tokens), dtype and device of ``key``."""

    @abstractmethod
    def append(
        self, key: torch.Tensor, value: torch.Tensor, transform: QKTransform, query: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Stores counted tokens by the format's op, which transforms the keys, and the query, which it returns."""

    @abstractmethod
    def attend_stored(self, query: torch.Tensor, mask: torch.Tensor | None, scaling: float) -> torch.Tensor:
        """Attention of one token a row by the format's op, query ``(B, H, D)``, rotated if the stored keys are, and
        result alike."""

    def write(self, key: torch.Tensor, value: torch.Tensor) -> None:
        self.append(key, value, ROTATED if self.rotate_keys else NOTHING)

    def decode(self, query: torch.Tensor, mask: torch.Tensor | None, scaling: float) -> torch.Tensor:
        """Attention of one new token a row, query ``(B, H, D)`` and result alike; mask: bool ``(B, length)``."""
        q = rotate(query) if self.rotate_keys else query
        return self.attend_stored(q.contiguous(), mask, scaling)

    def step(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        transform: QKTransform,
        mask: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        """``update()`` and attention of one new token a row, as the projections leave it.

        Args:
            query, key, value: ``(B, heads, 1, D)``, any strides with a contiguous last dimension.
            transform: what is done to queries and keys; it rotates if ``rotate_keys``.
            mask: bool ``(B, >= length)``, True where a token may be attended; None: all may.

        Returns ``(B, H, D)``, contiguous.
        """
        self._admit(key, value)
        return self.step_counted(query, key, value, transform, mask, scaling)

    def step_counted(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        transform: QKTransform,
        mask: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        """:meth:`step` of a counted token, by the format's ops: two, if it has none that does both."""
        ready = self.append(key, value, transform, query)
        assert ready is not None
        return self.attend_stored(ready.squeeze(2), mask, scaling)

    @abstractmethod
    def expand_stored(self, which: str, tokens: slice, dtype: torch.dtype) -> torch.Tensor:
        """``"keys"`` or ``"values"`` of the tokens ``tokens.start .. tokens.stop`` as a plain tensor, in the form that
        they are stored in: keys may be rotated."""

    def expand(self, which: str, length: int, dtype: torch.dtype) -> torch.Tensor:
        stored = self.expand_stored(which, slice(0, length), dtype)
        return rotate(stored) if which == "keys" and self.rotate_keys else stored

    def attend_chunk(self, query: torch.Tensor, mask: torch.Tensor | None, scaling: float) -> torch.Tensor:
        """Attention of the latest q tokens over all that is stored, one tile of which is expanded at a time.

        Args:
            query: ``(B, H, q, D)``, the result alike. mask: bool ``(B or 1, 1, q, length)``; None: causal.
        """
        q = rotate(query) if self.rotate_keys else query

        def expand(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
            keys, values = (self.expand_stored(which, slice(start, stop), query.dtype) for which in ("keys", "values"))
            return keys, values

        return attend_in_tiles(q, self.storage[0].shape[1], self.length, expand, mask, scaling)

    def attend(self, query: torch.Tensor, mask: torch.Tensor | None, scaling: float) -> torch.Tensor:
        """With ``attends_chunks``, attention of the new tokens: query ``(B, H, q, D)`` and result alike; mask: bool
        ``(B, q, length)``, or None: causal."""
        raise NotImplementedError

    def allocate(self, key: torch.Tensor, value: torch.Tensor, capacity: int) -> list[torch.Tensor]:
        if not self.reference:
            self._check_kernels(key)
        if key.shape != value.shape:
            raise Unsupported(
                f"the {self.format} KV cache needs keys and values of one shape, got {tuple(key.shape)} and "
                f"{tuple(value.shape)}; kv_cache='static' takes any"
            )
        return self.new_storage(key, capacity)

    def _check_kernels(self, key: torch.Tensor) -> None:
        if key.is_cuda and (reason := self.why_no_kernel(key.shape[3])):
            raise Unsupported(
                f"{reason}; the cache's reference=True (of a patched model, fallback='reference') runs the slow "
                "PyTorch implementation"
            )
        require_device(key.device)
        if reason := why_no_kernels(key.device, key.dtype):
            raise Unsupported(reason)

    def read(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.fresh_prefill and key.shape[2] == self.length and key.shape[2] > 1:
            return key, value
        return self._handles(key)

    def _handles(self, key: torch.Tensor) -> tuple[LazyKV, LazyKV]:
        """What stands for all keys and values, ``key`` being new ones."""
        shape = (*key.shape[:2], self.length, key.shape[3])
        keys, values = (LazyKV(self, which, shape, key.dtype, key.device) for which in ("keys", "values"))
        return keys, values


class CompressedCache(FastCache):
    """A cache of :class:`CompressedLayer`.

    With ``attn_implementation="fastpath"`` (what ``patch_model`` sets) decoding reads what is stored. With any other
    implementation, so also on an unpatched model, each layer is expanded when its attention needs it.

    Args:
        config, max_cache_len: see :class:`FastCache`.
        fresh_prefill: let the first prompt chunk attend to its own unrounded keys and values (they are in memory
            anyway). With False it reads back what was stored, as later chunks do.
        reference: run on the reference implementations (plain PyTorch, slow), also where the kernels cannot run.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        max_cache_len: int = 0,
        fresh_prefill: bool = True,
        reference: bool = False,
        **layer_options: Any,
    ) -> None:
        super().__init__(
            config, max_cache_len=max_cache_len, fresh_prefill=fresh_prefill, reference=reference, **layer_options
        )
