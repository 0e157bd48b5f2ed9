"""What each cache format is to give back, written down once more and as simply as possible: the caches' test oracle."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import make_llama
from transformers import DynamicCache

from hf_fastpath import Fp8KVCache, Int4KIVICache, Int8KVCache, StaticKVCache
from hf_fastpath.ops._rotation import rotate
from hf_fastpath.ops.kv_int8_append import quantize_int8

E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
E4M3 = E4M3[E4M3.isfinite()].unique()


def nearest(x: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """The nearest of the sorted values ``allowed``; in the middle of two, that with the even index from 0."""
    above = torch.searchsorted(allowed, x).clamp(1, len(allowed) - 1)
    low, high = allowed[above - 1], allowed[above]
    even = (above - int((allowed == 0).nonzero())) % 2 == 0
    take_high = (high - x < x - low) | ((high - x == x - low) & even)
    return torch.where(take_high, high, low)


class Plain:
    """Nothing is rounded. ``group`` tokens are rounded together, as soon as they are there."""

    group = 1
    sinks = 0  # tokens in front that are in no group
    rotates = False  # whether keys are stored rotated

    def keys(self, group: torch.Tensor) -> torch.Tensor:
        """What a group of keys ``(B, H, group, D)`` becomes."""
        return group

    def values(self, group: torch.Tensor) -> torch.Tensor:
        return group


class Int8(Plain):
    rotates = True

    def keys(self, group: torch.Tensor) -> torch.Tensor:
        q, scale = quantize_int8(group)
        return q.float() * scale.float().unsqueeze(-1)

    values = keys


class Fp8(Plain):
    group = 64
    rotates = True

    def keys(self, group: torch.Tensor) -> torch.Tensor:
        largest = group.double().abs().amax((2, 3), keepdim=True)
        scale = 2.0 ** (largest / 448).log2().ceil()
        return (nearest(group.double() / scale, E4M3) * scale).to(group.dtype)

    values = keys


class Int4(Plain):
    group, sinks, rotates = 64, 4, True

    def keys(self, group: torch.Tensor) -> torch.Tensor:
        return self._round(group, 2)

    def values(self, group: torch.Tensor) -> torch.Tensor:
        return self._round(group, 3)

    def _round(self, group: torch.Tensor, dim: int) -> torch.Tensor:
        low, high = group.amin(dim, keepdim=True), group.amax(dim, keepdim=True)
        scale, low = ((high - low) / 15).half().float(), low.half().float()
        return ((group - low) / scale).round().clamp(0, 15) * scale + low


MODELS: dict[type, type[Plain]] = {StaticKVCache: Plain, Int8KVCache: Int8, Fp8KVCache: Fp8, Int4KIVICache: Int4}
CACHES = list(MODELS)


def random_kv(batch: int, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, batch, 2, tokens, 16, generator=generator)
    return key, value


def filled_storage(cache_class: Any, batch: int, tokens: int, dim: int) -> list[torch.Tensor]:
    """The storage of a layer with two KV heads that holds random tokens."""
    layer = cache_class.layer_class()
    layer.update(*torch.randn(2, batch, 2, tokens, dim))
    return layer.storage


class Mirror:
    """A cache of the class under test beside a DynamicCache that holds what the cache should hold, and another one that
    holds the same tokens as they were before their group was rounded."""

    def __init__(self, cache_class: type, batch: int = 3, **options: Any) -> None:
        self.kind, self.model = cache_class, MODELS[cache_class]()
        for option, value in options.items():
            setattr(self.model, {"group_tokens": "group", "sinks": "sinks", "rotate_keys": "rotates"}[option], value)
        self.cache = cache_class(make_llama().config, **options)
        self.batch, self.seed = batch, 0
        self._forget()

    def _forget(self) -> None:
        self.expected, self.unrounded = (DynamicCache(config=make_llama().config) for _ in range(2))
        self.written = 0  # the most tokens that there were

    def reset(self) -> None:
        self.cache.reset()
        self._forget()

    def append(self, tokens: int) -> None:
        start = self.cache.get_seq_length()
        for layer in range(2):
            self.seed += 1
            key, value = random_kv(self.batch, tokens, self.seed)
            self.cache.update(key, value, layer)
            for cache in (self.expected, self.unrounded):
                cache.update(rotate(key) if self.model.rotates else key, value, layer)
            self._round(self.expected.layers[layer], start)
        self.written = max(self.written, start + tokens)

    def _round(self, plain: Any, start: int) -> None:
        group = self.model.group
        for first in range(self._first_open(start), plain.keys.shape[2] - group + 1, group):
            part = slice(first, first + group)
            plain.keys[:, :, part] = self.model.keys(plain.keys[:, :, part])
            plain.values[:, :, part] = self.model.values(plain.values[:, :, part])

    def _first_open(self, length: int) -> int:
        """The first token of the group that is not full."""
        behind = max(length - self.model.sinks, 0)
        return self.model.sinks + behind // self.model.group * self.model.group

    def crop(self, tokens: int) -> None:
        """Tokens of a group that is not full any more come back as they were, while the cache has them: a later token
        takes the place of the one that is a group before it."""
        self.both("crop", -tokens)
        length, group = self.cache.get_seq_length(), self.model.group
        for plain, unrounded in zip(self.expected.layers, self.unrounded.layers, strict=True):
            for which in ("keys", "values") if plain.is_initialized else ():
                held, before = getattr(plain, which), getattr(unrounded, which)
                for token in range(self._first_open(length), length):
                    source, target = (before, held) if token >= self.written - group else (held, before)
                    target[:, :, token] = source[:, :, token]

    def both(self, operation: str, *args: Any) -> None:
        """The same operation on the cache and on what it is compared with."""
        for cache in (self.cache, self.expected, self.unrounded):
            getattr(cache, operation)(*args)

    def check(self) -> None:
        for got, want in zip(self.cache.layers, self.expected.layers, strict=True):
            # Rotating keys back is a product whose sums depend on its shape in the last bit.
            keys = rotate(want.keys) if self.model.rotates else want.keys
            torch.testing.assert_close(got.keys, keys, rtol=0, atol=1e-5)
            assert torch.equal(got.values, want.values)
            assert bool((got.storage[-1] == got.get_seq_length()).all())  # what the kernels count
            assert torch.equal(got.tickets, torch.zeros_like(got.storage[-1]).flatten())
        assert self.cache.get_seq_length() == self.expected.get_seq_length()
        assert self.cache.get_mask_sizes(4, 0) == self.expected.get_mask_sizes(4, 0)
