"""The decode step of generate() over slots on the CPU, for tests: what a CUDA graph replays is here called again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from hf_fastpath.caches.conv_state import ConvStateLayer
from hf_fastpath.decode_graph import DecodeGraphs
from hf_fastpath.spare_rows import SpareRows
from hf_fastpath.steps import STATE

GREEDY = {"do_sample": False, "max_new_tokens": 12}
SAMPLE = {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 1.5, "max_new_tokens": 12}


class CalledAgain:
    """In the place of a CUDA graph: records nothing, and replays by calling again."""

    def __init__(self, call: Callable[[], None], log: list[str]) -> None:
        self.call, self.log = call, log

    def replay(self) -> None:
        self.log.append("replay")
        self.call()


class FakeCapture:
    log: list[str]

    def __init__(self, log: list[str], device: torch.device) -> None:
        self.log = log

    def __call__(self, call: Callable[[], None]) -> CalledAgain:
        self.log.append("capture")
        return CalledAgain(call, self.log)


def with_graphs(model: Any, spare: SpareRows | None = None) -> Any:
    """A patched model with graphs, which only models on a GPU use by themselves. spare: what rows that no batch has are
    to be to its steps; None: what they are by themselves."""
    state, log = getattr(model, STATE), []
    state.graphs = DecodeGraphs(functools.partial(FakeCapture, log))
    state.graphs.watch(model)
    state.graphs.spare = state.graphs.spare if spare is None else spare
    state.graphs.log = log
    return model


def log_of(model: Any) -> list[str]:
    return model._fastpath.graphs.log


def plain(model: Any, **inputs: Any) -> Any:
    """The same call by transformers' own loop."""
    graphs, model._fastpath.graphs = model._fastpath.graphs, None
    try:
        return model.generate(**inputs)
    finally:
        model._fastpath.graphs = graphs


def check_alike(model: Any, **inputs: Any) -> Any:
    """The same tokens and the same random numbers afterwards as by transformers' own loop."""
    torch.manual_seed(1)
    want = plain(model, **inputs)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    got = model.generate(**inputs)
    assert torch.equal(torch.get_rng_state(), after)
    if isinstance(got, torch.Tensor):
        assert torch.equal(got, want)
        return got
    assert torch.equal(got.sequences, want.sequences)
    for name in ("scores", "logits"):
        assert (got[name] is None) == (want[name] is None) if name in want else name not in got
        for mine, theirs in zip(got.get(name) or (), want.get(name) or (), strict=True):
            assert torch.equal(mine, theirs)
    for mine, theirs in zip(got.past_key_values.layers, want.past_key_values.layers, strict=True):
        if isinstance(mine, ConvStateLayer):
            assert torch.equal(mine.conv_states[0], theirs.conv_states[0])
            continue
        assert mine.get_seq_length() == theirs.get_seq_length()
        assert torch.equal(mine.keys, theirs.keys)
        assert torch.equal(mine.storage[-1], theirs.storage[-1])
    return got
