"""Feeding a text through a KV cache in chunks, so that every token attends to what the cache holds in decoding."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from hf_fastpath.caches import FastLayer
from hf_fastpath.caches.grouped import GroupedLayer

KV_CHUNK = 64


def attention_layer(cache: Any) -> tuple[int, Any]:
    """The first layer of one of our caches with keys and values, and its number."""
    return next((index, layer) for index, layer in enumerate(cache.layers) if isinstance(layer, FastLayer))


def chunk_sizes(cache: Any, tokens: int, kv_chunk: int = KV_CHUNK, seen: int = 0) -> list[int]:
    """Chunks of up to ``kv_chunk`` of ``tokens`` tokens in which every token sees what it sees in decoding.

    Caches that keep the tokens of a group that is not full in full precision round them when the last one comes, which
    must be alone for it: the others of the chunk came before it. So what a token attends to does not depend on
    ``kv_chunk``, nor on what follows it, right padding included.

    Args:
        cache: one of ours with ``fresh_prefill=False``, or transformers' DynamicCache; seen: tokens that it holds.

    Raises:
        ValueError: ``kv_chunk`` is less than 1.
    """
    if kv_chunk < 1:
        raise ValueError(f"kv_chunk={kv_chunk}: must be 1 (token by token) or more")
    grouped = [layer for layer in cache.layers if isinstance(layer, GroupedLayer)]
    cuts = {0, tokens}
    if grouped:
        group = grouped[0].group_tokens
        first = grouped[0].sinks + group - 1 - seen
        filling = range(first if first >= 0 else first % group, tokens, group)
        cuts |= {*filling, *(last + 1 for last in filling)}
    sizes: list[int] = []
    for start, stop in itertools.pairwise(sorted(cuts)):
        sizes += [min(kv_chunk, stop - first) for first in range(start, stop, kv_chunk)]
    return sizes


def logits_in_chunks(
    model: Any, ids: torch.Tensor, cache: Any, kv_chunk: int = KV_CHUNK, seen: int = 0, **options: Any
) -> Iterator[torch.Tensor]:
    """The logits ``(B, size, vocabulary)`` of one chunk of ``ids`` ``(B, T)`` after the other.

    Rows may be padded on the right: logits of a row's own tokens do not depend on it.

    Args:
        cache, seen: see :func:`chunk_sizes`; it is filled. options: of the model's call.
    """
    for chunk in ids.split(chunk_sizes(cache, ids.shape[1], kv_chunk, seen), dim=1):
        yield model(input_ids=chunk, past_key_values=cache, use_cache=True, **options).logits
