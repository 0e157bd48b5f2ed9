"""Log-likelihoods of continuations through a KV cache, the tokens that several of them begin with being read once.

What a token attends to in the cache does not depend on how its text is cut (:func:`chunk_sizes`), so a context can be
read once for all its continuations, and what the contexts of a batch begin with (the examples shown for a subject of
MMLU) once for all of them: the rows of the cache are copied instead.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hf_fastpath.eval.chunks import logits_in_chunks

Tokens = tuple[int, ...]
Answer = tuple[float, bool]  # log-likelihood of the continuation in nats, whether greedy decoding would have given it

_HEAD = 64  # tokens by which contexts are found that begin alike
_ALIKE = 16  # of so many contexts that begin alike, batches are made of their own
_LOGIT_ROWS = 1024  # rows whose logits are widened to float32 at a time: 200 MB with a vocabulary of 50,000


@dataclasses.dataclass(frozen=True)
class Question:
    """A context and its continuations, none of them empty."""

    context: Tokens
    continuations: tuple[Tokens, ...]


@dataclasses.dataclass(frozen=True)
class _Row:
    """What is fed after the tokens that all contexts of a batch are read to, and what is predicted at its end."""

    question: int
    tokens: Tokens
    continuations: tuple[int, ...]  # of the question, alike but for their last tokens


def in_batches(questions: Sequence[Question], size: int) -> list[list[int]]:
    """Indices of questions with contexts of about the same length, up to ``size`` rows together, the longest first.
    Contexts that many others begin like are together with those."""
    contexts = [question.context for question in questions]
    heads = collections.Counter(context[:_HEAD] for context in contexts if len(context) > _HEAD)

    def head(index: int) -> Tokens:
        own = contexts[index][:_HEAD]
        return own if heads[own] >= _ALIKE else ()

    groups: dict[Tokens, list[int]] = {}
    for index in sorted(range(len(contexts)), key=lambda index: (-len(contexts[index]), contexts[index])):
        groups.setdefault(head(index), []).append(index)
    batches: list[list[int]] = []
    for group in groups.values():
        room = 0
        for index in group:
            rows = len({continuation[:-1] for continuation in questions[index].continuations})
            if rows > room:
                batches.append([])
                room = max(size, rows)
            batches[-1].append(index)
            room -= rows
    return batches


@torch.inference_mode()
def answer(
    model: Any, questions: Sequence[Question], make_cache: Callable[[], Any], kv_chunk: int
) -> list[list[Answer]]:
    """The answers to a batch of questions, one a continuation.

    Args:
        make_cache: makes an empty cache, see :func:`hf_fastpath.eval.chunks.chunk_sizes`. kv_chunk: tokens fed at once.
    """
    contexts = [question.context for question in questions]
    shared = min(map(len, contexts)) - 1  # a context's last token predicts, so its logits are wanted
    start = min(_common(contexts), shared) if len(contexts) > 1 else 0
    rows = [row for number, question in enumerate(questions) for row in _rows(number, question, shared)]
    cache = make_cache()
    _read(model, cache, [contexts[0][:start]], 0, kv_chunk)
    _copy_rows(model, cache, start, [0] * len(contexts))
    _read(model, cache, [context[start:shared] for context in contexts], start, kv_chunk)
    _copy_rows(model, cache, shared, [row.question for row in rows])
    found = _score(model, cache, questions, rows, shared, kv_chunk)
    return [
        [found[number, choice] for choice in range(len(question.continuations))]
        for number, question in enumerate(questions)
    ]


def _common(contexts: Sequence[Tokens]) -> int:
    """Tokens that all of them begin with."""
    first, last = min(contexts), max(contexts)  # those between them begin with what these have in common
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def _rows(number: int, question: Question, shared: int) -> list[_Row]:
    """Continuations of one token are predicted in one row."""
    inputs: dict[Tokens, list[int]] = {}
    for choice, continuation in enumerate(question.continuations):
        inputs.setdefault(continuation[:-1], []).append(choice)
    rest = question.context[shared:]
    return [_Row(number, rest + tokens, tuple(choices)) for tokens, choices in inputs.items()]


def _read(model: Any, cache: Any, tokens: Sequence[Tokens], seen: int, kv_chunk: int) -> None:
    """Fills the cache. Nothing of what is predicted is wanted, so of a chunk only its last token's logits are made."""
    if not tokens[0]:
        return
    options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    ids = torch.tensor(tokens, device=model.device)
    collections.deque(logits_in_chunks(model, ids, cache, kv_chunk, seen, **options), maxlen=0)


def _copy_rows(model: Any, cache: Any, seen: int, rows: Sequence[int]) -> None:
    """Row i becomes what row ``rows[i]`` was, in any number: layers of every kind know that as a beam search's wish."""
    if seen:
        cache.reorder_cache(torch.tensor(rows, device=model.device))


def _score(
    model: Any, cache: Any, questions: Sequence[Question], rows: Sequence[_Row], seen: int, kv_chunk: int
) -> dict[tuple[int, int], Answer]:
    """The answers by question and continuation. Logits are kept of the predicting positions only."""
    ids = torch.zeros((len(rows), max(len(row.tokens) for row in rows)), dtype=torch.long)
    wanted: list[tuple[int, int, int, int]] = []  # position, row, token predicted there, number of the answer
    names: list[tuple[int, int]] = []
    for number, row in enumerate(rows):
        ids[number, : len(row.tokens)] = torch.tensor(row.tokens)
        for choice in row.continuations:
            continuation = questions[row.question].continuations[choice]
            first = len(row.tokens) - len(continuation)
            wanted += [(first + i, number, token, len(names)) for i, token in enumerate(continuation)]
            names.append((row.question, choice))
    wanted.sort()
    positions, at, targets, owners = torch.tensor(wanted).unbind(1)
    logs, hits, start = [], [], 0
    for logits in logits_in_chunks(model, ids.to(model.device), cache, kv_chunk, seen):
        stop = start + logits.shape[1]
        low, high = (bisect.bisect_left(wanted, (edge,)) for edge in (start, stop))
        for begin in range(low, high, _LOGIT_ROWS):
            part = slice(begin, min(begin + _LOGIT_ROWS, high))
            row, position, target = (x[part].to(logits.device) for x in (at, positions - start, targets))
            chosen = logits[row, position]
            logs.append(chosen.float().log_softmax(-1).gather(1, target[:, None])[:, 0])
            hits.append(chosen.argmax(-1) == target)
        start = stop
    sums = torch.zeros(len(names), dtype=torch.float64).index_add_(0, owners, torch.cat(logs).cpu().double())
    misses = torch.zeros(len(names), dtype=torch.long).index_add_(0, owners, (~torch.cat(hits)).cpu().long())
    return dict(zip(names, zip(sums.tolist(), (misses == 0).tolist(), strict=True), strict=True))
