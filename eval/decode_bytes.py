"""The bytes that one decode step must read: what a rate of memory allows at the most."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_fastpath.config import KVFormat
from hf_fastpath.generation import CACHES
from hf_fastpath.report import module_bytes


def step_bytes(model: Any, batch: int, length: float) -> float:
    """Of all weights and of the caches of all rows, for one new token a row.

    Args:
        length: tokens in the cache of a row.
    """
    return weight_bytes_read(model, batch) + batch * cache_bytes_read(model, length)


def weight_bytes_read(model: Any, batch: int) -> float:
    """Each weight once, however many rows there are; of experts as many as rows choose that choose at random; of an
    embedding that the head does not share, nothing: a row of it a token."""
    sizes, embeddings = module_bytes(model), set(_unshared_embeddings(model))
    experts = sum(size for name, size in sizes.items() if "experts" in name.split("."))
    rest = sum(size for name, size in sizes.items() if name not in embeddings) - experts
    return rest + experts * chosen_share(model.config, batch)


def chosen_share(config: Any, batch: int) -> float:
    """The expected share of a layer's experts that some row chooses, each ``num_experts_per_tok`` of them at random."""
    count = getattr(config, "num_experts", None)
    return 1 - (1 - config.num_experts_per_tok / count) ** batch if count else 1.0


def _unshared_embeddings(model: Any) -> list[str]:
    head = model.get_output_embeddings()
    shared = getattr(head, "weight", None)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module.weight is not shared
    ]


def cache_bytes_read(model: Any, length: float) -> float:
    """Of a row's keys and values, all that are kept of ``length`` tokens. (What a format keeps in full precision of the
    first and latest tokens is counted like the others; states of convolutions are not counted.)"""
    state = getattr(model, "_fastpath", None)
    kv_format = (state and state.config.kv_cache) or KVFormat.STATIC  # transformers' own is in full precision as well
    options = state.config.cache_options if state else {}
    kept = min(length, options.get("kv_budget", length))
    return CACHES[kv_format](model.config, **options).bytes_per_token * kept
