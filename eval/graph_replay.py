"""The CUDA graphs of a token, replayed without generate(): what it could reach, and what a profiler is to see."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch

from hf_fastpath.errors import Unsupported

_TOKENS = 4


@dataclasses.dataclass
class Replay:
    """The graphs of one slot for one batch size. Keep it as long as they are replayed: it holds the cache.

    Attributes:
        model_step: replays the model's step, with the choice of the next tokens where one graph is of both.
        choice: replays the choice where it has a graph of its own; None: it has none.
        room: how many more steps fit into the slot.
    """

    model_step: Callable[[], None]
    choice: Callable[[], None] | None
    room: int
    cache: Any
    device: torch.device

    def step(self) -> None:
        """The model's step, with the choice if that is in its graph.

        Raises:
            ValueError: the slot is full, and a kernel would write behind its end.
        """
        if self.room < 1:
            raise ValueError("the slot is full: generate fewer tokens before")
        self.room -= 1
        self.model_step()

    def token(self) -> None:
        """One token a row: the choice, and the step that follows it; or a step with the choice behind it."""
        if self.choice is not None:
            self.choice()
        self.step()

    def rate(self, rows: int, at_most: int = 512) -> float:
        """Tokens a second of ``rows`` rows with nothing but the graphs, queued one behind the other."""
        steps = max(min(self.room, at_most), 1)
        self._wait()
        start = time.perf_counter()
        for _ in range(steps):
            self.token()
        self._wait()
        return rows * steps / (time.perf_counter() - start)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def replay_of(model: Any, inputs: dict[str, torch.Tensor], new: int, **how: Any) -> Replay:
    """The graphs that generate() uses for these inputs, captured if they were not.

    Args:
        new: how many tokens there is to be room for; fewer than 4 if calls before had room for more.
        how: further arguments of generate().

    Raises:
        Unsupported: the model's steps are not captured; the message says why.
    """
    graphs = getattr(getattr(model, "_fastpath", None), "graphs", None)
    if graphs is None or (reason := graphs.why_not(model)):
        raise Unsupported(f"no graph to replay: {'the model has none' if graphs is None else reason}")
    # A first call makes the slot as large as it has to be; the third token of a call is one of captured graphs.
    out: Any = None
    for tokens in (new, _TOKENS) if new > _TOKENS else (_TOKENS,):
        out = None  # a cache that somebody has keeps its slot
        out = model.generate(**inputs, **how, max_new_tokens=tokens, return_dict_in_generate=True)
    cache = out.past_key_values
    slot = graphs.slot_of(cache)
    if slot is None:
        raise Unsupported("no graph to replay: generate() did not use one for this cache")
    most = min(slot.capacity, getattr(model.config, "max_position_embeddings", slot.capacity))
    room, used = most - cache.get_seq_length() - 1, slot.captured[-2:]
    match [name for name, _ in used]:  # a call ends with a choice
        case [*_, "token"]:
            return Replay(used[-1][1].replay, None, room, cache, slot.device)
        case ["step", "choice"]:
            return Replay(used[0][1].replay, used[1][1].replay, room, cache, slot.device)
    raise Unsupported("no graph to replay: how tokens are chosen is not captured")
