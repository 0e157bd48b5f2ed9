"""What the formats share that quantize tokens in groups and keep the latest ones in full precision."""

from __future__ import annotations

from abc import abstractmethod

import torch

from hf_fastpath.caches.compressed import CompressedLayer
from hf_fastpath.ops._groups import quantized_after, ring_write


class GroupedLayer(CompressedLayer):
    """A layer that keeps the latest tokens in rings: see :mod:`hf_fastpath.ops._groups`, which says when a group is
    quantized. ``quantized`` is the host's copy of how many tokens are, as ``length`` is of how many are stored."""

    group_tokens: int
    ring_tokens: int

    def __init__(self, initial_tokens: int = 0, fresh_prefill: bool = True, reference: bool = False) -> None:
        super().__init__(initial_tokens, fresh_prefill, reference)
        self.quantized = 0

    @property
    @abstractmethod
    def rings(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The rings of the latest keys and values."""

    @property
    @abstractmethod
    def lengths(self) -> torch.Tensor:
        """Tokens stored and tokens quantized, int32 ``(B, H_kv, 2)``."""

    @abstractmethod
    def append(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Appends to the storage by its op, which counts in ``lengths``."""

    @abstractmethod
    def expand_stored(self, which: str, length: int, dtype: torch.dtype) -> torch.Tensor:
        """:meth:`expand`, but in the form that the ring holds (keys may be stored rotated)."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.quantized = 0

    def write(self, key: torch.Tensor, value: torch.Tensor, start: int) -> None:
        self.append(key, value)
        self.quantized = quantized_after(self.length, self.quantized, self.group_tokens, self.ring_tokens)

    def reset(self) -> None:
        super().reset()
        self._set_lengths(0)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last ``-tokens_to_remove`` tokens. What is left of a group that was quantized moves back to the
        full-precision tokens, with the values that quantizing gave it."""
        super().crop(tokens_to_remove)
        if self.is_initialized:
            self._set_lengths(min(self.quantized, self.length // self.group_tokens * self.group_tokens))

    @torch.inference_mode(False)
    def _set_lengths(self, quantized: int) -> None:
        if quantized < self.quantized and self.length > quantized:
            for which, ring in zip(("keys", "values"), self.rings, strict=True):
                kept = self.expand_stored(which, self.length, self.dtype)[:, :, quantized:]
                ring_write(ring, kept, quantized)
        self.quantized = quantized
        if self.is_initialized:
            self.lengths[..., 0], self.lengths[..., 1] = self.length, quantized
