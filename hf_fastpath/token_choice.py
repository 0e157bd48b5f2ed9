"""How the next tokens are chosen from logits, as transformers' generate() does it: call by call, or as a CUDA graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from hf_fastpath.ops import choose_tokens, sampling_weights
from hf_fastpath.ops.sampling_weights import MAX_VOCABULARY
from hf_fastpath.slot import Slot


@dataclasses.dataclass(frozen=True)
class Filters:
    """Processors that :func:`hf_fastpath.ops.sampling_weights` stands for; its defaults change nothing."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


@dataclasses.dataclass(frozen=True)
class Rule:
    """What generate() was asked for.

    Attributes:
        do_sample: draw by the processed logits' softmax; otherwise the largest is taken.
        processors: called with the tokens so far, int64 ``(B, T)``, and float32 logits ``(B, V)``.
        criteria: called with the tokens so far and the scores, if kept; gives bool ``(B,)``, which rows are finished.
        max_length: tokens of a row at which generating ends; None: no limit.
        end: int64, tokens that finish a row; None where nothing but ``max_length`` and other criteria do.
        pad: int64 ``()``, what a finished row goes on with; None only without ``end``.
        keep_scores, keep_logits: whether processed and raw logits are wanted.
        key: equal for rules that choose alike and need the logits only; None: the rule needs more.
        filters: what does the same as ``processors``; None: nothing does.
    """

    do_sample: bool
    processors: Any
    criteria: Any
    max_length: int | None
    end: torch.Tensor | None
    pad: torch.Tensor | None
    keep_scores: bool
    keep_logits: bool
    key: Any = None
    filters: Filters | None = None


class Choice(Protocol):
    """Chooses one token a row at each call.

    Attributes:
        latest: int64 ``(B,)``, the tokens of the last call.
        done: bool ``()``, whether all rows are finished with them; None: :meth:`finished_by` says so.
    """

    latest: torch.Tensor
    done: torch.Tensor | None

    def __call__(self, logits: torch.Tensor) -> None:
        """Chooses by logits ``(B, V)`` in the model's dtype, which it does not change."""

    def finished_by(self, count: int) -> int:
        """Waits for the first ``count`` calls where ``done`` is None; then how many it took until all rows were
        finished, if that is known, or 0."""

    def drop(self, count: int) -> None:
        """Forgets the last ``count`` calls."""

    def sequences(self) -> torch.Tensor:
        """The prompt and all tokens, int64 ``(B, T)``."""


class CallByCall:
    """Any rule."""

    def __init__(self, rule: Rule, prompt: torch.Tensor) -> None:
        self.rule, self.ids = rule, prompt
        self.unfinished = torch.ones(prompt.shape[0], dtype=torch.long, device=prompt.device)
        self.scores: tuple[torch.Tensor, ...] | None = () if rule.keep_scores else None
        self.logits: tuple[torch.Tensor, ...] | None = () if rule.keep_logits else None
        self.latest, self.done = prompt[:, -1:], None

    latest: torch.Tensor
    done: torch.Tensor | None

    def __call__(self, logits: torch.Tensor) -> None:
        rule, raw = self.rule, logits.to(torch.float32, copy=True)
        scores = rule.processors(self.ids, raw)
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (raw,)
        if rule.do_sample:
            tokens = torch.multinomial(torch.nn.functional.softmax(scores, dim=-1), num_samples=1).squeeze(1)
        else:
            tokens = torch.argmax(scores, dim=-1)
        if rule.end is not None and rule.pad is not None:
            tokens = tokens * self.unfinished + rule.pad * (1 - self.unfinished)
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=-1)
        self.unfinished = self.unfinished & ~rule.criteria(self.ids, self.scores)
        self.latest, self.done = tokens, self.unfinished.max() == 0

    def finished_by(self, count: int) -> int:
        return 0

    def drop(self, count: int) -> None:
        if count:
            self.ids = self.ids[:, :-count]
            self.scores = self.scores and self.scores[:-count]
            self.logits = self.logits and self.logits[:-count]

    def sequences(self) -> torch.Tensor:
        return self.ids


class InGraph:
    """A rule with a ``key``, for the logits of a slot, whose next tokens it sets."""

    def __init__(self, rule: Rule, prompt: torch.Tensor, slot: Slot) -> None:
        self.rule, self.prompt, self.slot, self.count = rule, prompt, slot, 0
        self.scores = self.logits = None
        self.latest, self.done = slot.ids[: slot.batch, 0], None
        # As many random numbers as the batch has rows are drawn, and between two steps.
        self._rows = slot.batch if rule.do_sample else slot.step_rows
        self._has_chosen = False

    latest: torch.Tensor
    done: torch.Tensor | None

    def __call__(self, logits: torch.Tensor) -> None:
        rule, slot = self.rule, self.slot
        if not self._has_chosen:
            # Only the rule is kept with the graph, whose tensors it reads: not the prompt, not the slot itself.
            slot.run(("choice", self._rows, rule.key), lambda: _choose(rule, slot, self._rows), keep=rule)
        self._has_chosen = False
        self.count += 1

    def step(self, forward: Callable[..., Any]) -> None:
        """The slot's step with the model's ``forward``. If one graph is of that and of the choice by its logits, the
        next call, which is for these logits, finds the tokens chosen."""
        rule, slot, rows = self.rule, self.slot, self._rows
        if rule.do_sample:
            slot.step(forward)
        else:
            slot.step(forward, lambda: _choose(rule, slot, rows), rule.key, keep=rule)
        self._has_chosen = not rule.do_sample

    def finished_by(self, count: int) -> int:
        return 0 if self.rule.end is None else self.slot.progress.finished_by(count)

    def drop(self, count: int) -> None:
        self.count -= count

    def sequences(self) -> torch.Tensor:
        return torch.cat([self.prompt, self.slot.tokens[: self.slot.batch, : self.count]], dim=-1)


def _choose(rule: Rule, slot: Slot, rows: int) -> None:
    """From ``slot.logits`` to ``slot.ids`` of the first rows, without waiting for the GPU. Spare rows are among them,
    or, where it draws, get the tokens of the rows that they are once more."""
    assert slot.logits is not None
    state, scores = slot.state(rows), slot.logits[:rows]
    filters = rule.filters if rule.do_sample and scores.shape[1] <= MAX_VOCABULARY else None
    if filters is None and rule.processors:
        scores = rule.processors(state.tokens[:, :1], scores.to(torch.float32, copy=True))
    noise = None
    if rule.do_sample:
        if filters is not None:
            scores = sampling_weights(scores, **dataclasses.asdict(filters))
        else:
            scores = torch.nn.functional.softmax(scores, dim=-1, dtype=torch.float32)
        # torch.multinomial does this with the same random numbers, but for a check that a graph cannot hold.
        noise = torch.empty_like(scores).exponential_(1)
    choose_tokens(scores, noise, rule.end, rule.pad, state)
    if rule.do_sample:
        slot.put_spare()


def settings_of(processors: Sequence[Any], stateless: tuple[type, ...]) -> Any:
    """What tells one list of logits processors from another that computes something else; None when one of them is of
    no class in ``stateless``: those compute with the logits alone."""
    settings = []
    for processor in processors:
        values = tuple(sorted(vars(processor).items()))
        if type(processor) not in stateless or any(isinstance(value, torch.Tensor) for _, value in values):
            return None
        settings.append((type(processor), values))
    return tuple(settings)
