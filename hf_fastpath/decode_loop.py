"""The decode loop of generate(), greedy or sampling, in which the host does not wait for the token that it queued last.

Tokens, scores and the state of the random numbers afterwards are those of transformers' own loop.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from hf_fastpath.slot import Slot
from hf_fastpath.token_choice import CallByCall, Choice, InGraph, Rule


@dataclasses.dataclass
class Decoded:
    """What the loop made: int64 ``(B, T)``, prompt included, and float32 ``(B, V)`` a token where they were wanted."""

    sequences: torch.Tensor
    scores: tuple[torch.Tensor, ...] | None
    logits: tuple[torch.Tensor, ...] | None


class StopWatch:
    """Learns ``lag`` steps late that all rows are finished, and streams tokens as late: the host reads what was
    reported or copied while later steps run."""

    def __init__(self, lag: int, batch: int, device: torch.device, streamer: Any) -> None:
        self.lag, self.streamer = lag, streamer
        self._free = [_Copy(batch, device) for _ in range(lag + 1)]
        self._pending: collections.deque[tuple[int, _Copy | None]] = collections.deque()
        self._steps = 0

    def __call__(self, choice: Choice, last: bool) -> int | None:
        """After a step was queued, the last one of all or not: how many steps were queued too many; None: go on."""
        self._steps += 1
        self._pending.append((self._steps, self._copy_of(choice)))
        while self._pending and (last or len(self._pending) > self.lag):
            step, copy = self._pending.popleft()
            stop = copy is not None and self._take(copy)
            if stop or 0 < choice.finished_by(step) <= step:
                return len(self._pending)
        return 0 if last else None

    def _copy_of(self, choice: Choice) -> _Copy | None:
        """What is on its way to the host; None: nobody wants anything that is not reported."""
        if choice.done is None and self.streamer is None:
            return None
        copy = self._free.pop()
        copy.start(choice.done, None if self.streamer is None else choice.latest)
        return copy

    def _take(self, copy: _Copy) -> bool:
        stop = copy.wait()
        if self.streamer is not None:
            self.streamer.put(copy.tokens.clone())
        self._free.append(copy)
        return stop


class _Copy:
    """A step's outcome on its way to the host."""

    def __init__(self, batch: int, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.done = torch.zeros((), dtype=torch.bool, pin_memory=self.on_gpu)
        self.tokens = torch.zeros(batch, dtype=torch.long, pin_memory=self.on_gpu)
        self._arrived = torch.cuda.Event() if self.on_gpu else None
        self._has_flag = False

    def start(self, done: torch.Tensor | None, tokens: torch.Tensor | None) -> None:
        self._has_flag = done is not None
        if done is not None:
            self.done.copy_(done, non_blocking=True)
        if tokens is not None:
            self.tokens.copy_(tokens, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()

    def wait(self) -> bool:
        """Whether all rows were finished, once it is known."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._has_flag and bool(self.done)


class _Random:
    """The state of the random numbers before the latest draws, to which it returns if their tokens are dropped."""

    def __init__(self, device: torch.device, draws: int) -> None:
        gpu = device.type == "cuda"
        generator = torch.cuda.default_generators[device.index] if gpu else torch.default_generator
        # On a GPU one number says how far the generator is.
        self._get: Callable[[], Any] = generator.get_offset if gpu else generator.get_state
        self._set: Callable[[Any], Any] = generator.set_offset if gpu else generator.set_state
        self._before: collections.deque[Any] = collections.deque(maxlen=max(draws, 1))

    def note(self) -> None:
        self._before.append(self._get())

    def take_back(self, draws: int) -> None:
        if draws and self._before:
            self._set(self._before[-draws])


def _forward_in_form(model: Any, **inputs: Any) -> Any:
    """A model's ``forward``, in the form that :class:`_Steps` is about."""
    with model._optimize_model_for_decode():
        return model.forward(**inputs)


class _Steps:
    """The model's steps behind a prompt: by the graphs of a slot as long as the cache is in one.

    Where the model itself is called it is in transformers' form for single tokens, in which experts take more memory
    with more tokens; that form is put on and off by a walk through the model, for which no graph has to wait.
    """

    def __init__(self, model: Any, slot: Slot | None, cache: Any, positions: torch.Tensor, mask: Any) -> None:
        """positions: int64 ``(B, 1)``, of the first tokens. mask: ``(B, T)`` of the prompt; None: no padding."""
        self.model, self.slot, self.cache, self.positions, self.mask = model, slot, cache, positions, mask
        self.count = 0
        self._form: contextlib.ExitStack | None = None  # what takes the form off
        if slot is not None:
            slot.begin(positions, mask)

    def __call__(self, choice: Choice) -> torch.Tensor:
        """Logits of the tokens behind the latest ones, ``(B, V)`` in the model's dtype."""
        slot, count = self.slot, self.count
        self.count += 1
        if slot is not None and self.cache.get_seq_length() < slot.capacity:
            forward = functools.partial(_forward_in_form, self.model)  # which the slot calls for its first two steps
            if isinstance(choice, InGraph):
                choice.step(forward)
            else:
                slot.put(choice.latest)
                slot.step(forward)
            return _logits(slot)
        mask = self.mask
        if self._form is None:
            self._form = contextlib.ExitStack()
            self._form.enter_context(self.model._optimize_model_for_decode())
        out = self.model(
            input_ids=choice.latest[:, None].clone(),
            position_ids=self.positions + count,
            attention_mask=None if mask is None else torch.nn.functional.pad(mask, (0, count + 1), value=1),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            return_dict=True,
        )
        return self.first(out.logits)

    def close(self) -> None:
        """There are no more steps."""
        if self._form is not None:
            self._form.close()

    def first(self, logits: torch.Tensor) -> torch.Tensor:
        """The model's logits ``(B, T, V)`` of the last token, as :meth:`__call__` gives them."""
        if self.slot is None:
            return logits[:, -1].clone()
        self.slot.take(logits)
        return _logits(self.slot)


def _logits(slot: Slot) -> torch.Tensor:
    assert slot.logits is not None
    return slot.logits[: slot.batch]


def decode(
    model: Any,
    slot_of: Callable[[Any], Slot | None],
    prompt: torch.Tensor,
    prefill: Callable[[], Any],
    rule: Rule,
    inputs: dict[str, Any],
    streamer: Any,
    lag: int,
) -> Decoded:
    """Reads a prompt and generates.

    Args:
        slot_of: the slot that a cache is stored in, or None.
        prompt: int64 ``(B, T)``.
        prefill: calls the model with the prompt.
        inputs: ``past_key_values``, ``position_ids``, ``attention_mask`` or None, all of the prompt.
        streamer: transformers' BaseStreamer or None.
        lag: how many steps late the host looks whether to stop. The cache then may hold as many tokens too many, which
            are taken back if it can.
    """
    cache, mask = inputs["past_key_values"], inputs.get("attention_mask")
    if mask is not None and bool(mask.all()):  # the host waits here, not behind the prompt
        mask = None
    out, batch = prefill(), prompt.shape[0]
    slot, positions = slot_of(cache), inputs["position_ids"][:, -1:].expand(batch, -1) + 1
    steps = _Steps(model, slot, cache, positions, mask)
    logits, device = steps.first(out.logits), out.logits.device
    del out  # the logits of a whole prompt may be large
    choice, watch = _choice(rule, prompt, slot), StopWatch(lag, batch, device, streamer)
    random, length = _Random(device, lag), prompt.shape[1]
    with contextlib.closing(steps):
        while True:
            if rule.do_sample:
                random.note()
            choice(logits)
            length += 1
            surplus = watch(choice, rule.max_length is not None and length >= rule.max_length)
            if surplus is not None:
                break
            logits = steps(choice)
    choice.drop(surplus)
    random.take_back(surplus)
    if surplus and cache.can_forget:
        cache.crop(-surplus)
    if streamer is not None:
        streamer.end()
    return Decoded(choice.sequences(), choice.scores, choice.logits)


def _choice(rule: Rule, prompt: torch.Tensor, slot: Slot | None) -> CallByCall | InGraph:
    """In a graph, where the rule allows it and the slot has room for all tokens."""
    if slot is None or rule.key is None or rule.max_length is None:
        return CallByCall(rule, prompt)
    if rule.max_length - prompt.shape[1] > slot.capacity:
        return CallByCall(rule, prompt)
    return InGraph(rule, prompt, slot)
