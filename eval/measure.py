"""Speed and memory of a model as it stands: decode rate, bytes of its weights, bytes of its cache."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

from hf_fastpath.report import module_bytes


@dataclasses.dataclass(frozen=True)
class Rate:
    """Tokens per second: the median run, the slowest and the fastest."""

    median: float
    slowest: float
    fastest: float

    @property
    def spread(self) -> float:
        """How far the runs lie apart, relative to the median: what to distrust a small difference by."""
        return (self.fastest - self.slowest) / self.median


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers as they are stored now, tied ones counted once."""
    return sum(module_bytes(model).values())


@contextmanager
def float32_parameters(model: nn.Module) -> Iterator[None]:
    """Within it the parameters are float32, so that what is measured is not the noise of 16-bit arithmetic; afterwards
    they are what they were. Buffers stay: packed int4 weights are in none of the two."""
    dtypes = {parameter: parameter.dtype for parameter in model.parameters()}  # a tied one is there once
    for parameter in dtypes:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in dtypes.items():
            parameter.data = parameter.data.to(dtype)


@torch.inference_mode()
def cache_bytes_per_token(model: Any, cache: Any) -> int:
    """Bytes that one token of one sequence takes in ``cache`` (empty), measured by filling it with two tokens."""
    ids = torch.zeros((1, 2), dtype=torch.long, device=model.device)
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    if isinstance(cache, DynamicCache):
        layers: list[Any] = [layer for layer in cache.layers if isinstance(layer, CacheLayerMixin)]  # no convolutions
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) // ids.shape[1]
    return int(cache.bytes_per_token)


@torch.inference_mode()
def decode_rates(
    model: Any,
    inputs: dict[str, torch.Tensor],
    new_tokens: int,
    runs: int = 5,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Rate:
    """Greedy decode tokens per second with the standard generate(), the prompt's own pass left out.

    ``runs`` come after a warm-up; each is the time of ``new_tokens`` new tokens less the time of one.
    ``progress`` is called with (runs done, runs in all), the warm-up among them.
    """
    if new_tokens < 2 or runs < 1:
        raise ValueError(f"new_tokens={new_tokens}, runs={runs}: allowed are new_tokens >= 2 and runs >= 1")

    def seconds(count: int) -> float:
        start = time.perf_counter()
        model.generate(**inputs, do_sample=False, max_new_tokens=count, min_new_tokens=count)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        return time.perf_counter() - start

    seconds(2)
    times = []
    for done in range(runs):
        progress(done + 1, runs + 1)
        times.append(seconds(new_tokens) - seconds(1))
    progress(runs + 1, runs + 1)
    rates = [(new_tokens - 1) / time for time in times]
    return Rate(statistics.median(rates), min(rates), max(rates))


def decode_rate(model: Any, inputs: dict[str, torch.Tensor], new_tokens: int, runs: int = 5) -> float:
    """The median of :func:`decode_rates`."""
    return decode_rates(model, inputs, new_tokens, runs).median
