"""What the formats share that quantize tokens in groups and keep the latest ones in full precision."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch

from hf_fastpath.caches.compressed import CompressedLayer
from hf_fastpath.ops._append import QKTransform
from hf_fastpath.ops._groups import quantized_of, tail_write


class GroupedLayer(CompressedLayer):
    """A layer whose tokens are quantized in groups of ``group_tokens``, but for the first ``sinks``, as
    :mod:`hf_fastpath.ops._groups` says."""

    group_tokens: int
    sinks = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._written = 0  # the tails have had all tokens before this one

    @property
    @abstractmethod
    def tails(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The latest keys and values."""

    @abstractmethod
    def append_grouped(
        self, key: torch.Tensor, value: torch.Tensor, transform: QKTransform, query: torch.Tensor | None
    ) -> torch.Tensor | None:
        """What :meth:`append` is of other formats."""

    def append(
        self, key: torch.Tensor, value: torch.Tensor, transform: QKTransform, query: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        ready = self.append_grouped(key, value, transform, query)
        self._written = max(self._written, self.length)
        return ready

    def advance_to(self, length: int) -> None:
        super().advance_to(length)
        self._written = max(self._written, self.length)

    def reset(self) -> None:
        super().reset()
        self._written = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last ``-tokens_to_remove`` tokens. What is left of a group that was quantized is in the tail
        again: those of its tokens that were not overwritten there exactly, the others as quantizing left them."""
        if int(tokens_to_remove) < 0:
            self._refill_tails(max(0, self.length + int(tokens_to_remove)))
        super().crop(tokens_to_remove)

    @torch.inference_mode(False)
    def _refill_tails(self, length: int) -> None:
        """Puts those of the first ``length`` tokens that no full group will hold any more back into the tails."""
        first, before_first = (self._quantized_end(tokens) for tokens in (length, self.length))
        last = min(length, self._written - self.group_tokens)
        if first < min(before_first, last):
            for which, tail in zip(("keys", "values"), self.tails, strict=True):
                tail_write(tail, self.expand_stored(which, slice(first, last), self.dtype), first - self.sinks)

    def _quantized_end(self, stored: int) -> int:
        """The token behind the quantized ones."""
        return self.sinks + quantized_of(stored, self.group_tokens, self.sinks)
