"""Contexts that are read once: the same answers as reading every continuation's text by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import make_gpt2, make_lfm2, make_lfm2_moe, make_llama

from hf_fastpath import FastpathConfig, patch_model
from hf_fastpath.eval.chunks import logits_in_chunks
from hf_fastpath.eval.compare import empty_cache
from hf_fastpath.eval.continuations import Question, Tokens, _common, answer, in_batches

# Sums of up to 40 log-probabilities in float32, of logits whose order of sums depends on the shapes.
TOLERANCE = 1e-3
# And where keys and values are rounded, one at the edge may fall to the other side, by another order of sums: a step of
# one number in a cache of thousands. That the cache is in the loop shows in whole nats (test_eval_lm.py).
ROUNDED = 0.05

MODELS = {"llama": make_llama, "lfm2": make_lfm2, "lfm2_moe": make_lfm2_moe, "gpt2": make_gpt2}


def drawn(generator: torch.Generator, tokens: int) -> Tokens:
    return tuple(torch.randint(2, 199, (tokens,), generator=generator).tolist())


@pytest.fixture
def questions() -> list[Question]:
    """Contexts with 80 tokens in common, of different lengths, on both sides of groups' ends; continuations of one and
    of more tokens, one of them longer than a group."""
    generator = torch.Generator().manual_seed(8)
    head = drawn(generator, 80)
    made = []
    for more, sizes in ((61, (9, 30, 1)), (47, (1, 1, 1)), (3, (4, 70)), (48, (2, 2, 2, 1)), (112, (1,))):
        made.append(Question(head + drawn(generator, more), tuple(drawn(generator, size) for size in sizes)))
    return made


def one_by_one(model: Any, config: FastpathConfig | None, question: Question) -> list[tuple[float, bool]]:
    found = []
    for continuation in question.continuations:
        ids = torch.tensor([question.context + continuation])
        with torch.inference_mode():
            logits = torch.cat(list(logits_in_chunks(model, ids[:, :-1], empty_cache(model, config), 7)), 1)
        predicting = logits[0, len(question.context) - 1 :].double()
        target = torch.tensor(continuation)
        likelihood = predicting.log_softmax(-1).gather(1, target[:, None]).sum().item()
        found.append((likelihood, torch.equal(predicting.argmax(-1), target)))
    return found


@pytest.mark.parametrize("kv_cache", [None, "static", "int8", "fp8", "int4", "h2o"])
@pytest.mark.parametrize("family", MODELS)
def test_reading_a_context_once_changes_nothing(questions: list[Question], family: str, kv_cache: str | None) -> None:
    model, config = MODELS[family](), None
    if kv_cache:
        config = FastpathConfig(weights=None, kv_cache=kv_cache, kv_budget=48, progress=False)  # type: ignore[arg-type]
        patch_model(model, config)
    tolerance = TOLERANCE if kv_cache in (None, "static") else ROUNDED
    known = [one_by_one(model, config, question) for question in questions]
    for batch in ([0, 1, 2, 3, 4], [2], [4, 1]):
        found = answer(model, [questions[i] for i in batch], lambda: empty_cache(model, config), 64)
        for own, wanted in zip(found, [known[i] for i in batch], strict=True):
            for (likelihood, greedy), (exact, greedy_exact) in zip(own, wanted, strict=True):
                assert likelihood == pytest.approx(exact, abs=tolerance)
                assert greedy == greedy_exact


def test_the_greedy_continuation_is_found_to_be_greedy() -> None:
    model = make_llama()
    context = drawn(torch.Generator().manual_seed(1), 20)
    with torch.inference_mode():
        own = tuple(model.generate(torch.tensor([context]), max_new_tokens=5, do_sample=False)[0, 20:].tolist())
    other = (*own[:-1], own[-1] % 190 + 3)
    ((first, second, third),) = answer(
        model, [Question(context, (own, other, own[:1]))], lambda: empty_cache(model, None), 64
    )
    assert (first[1], second[1], third[1]) == (True, False, True)


def test_a_short_context_is_read_whole() -> None:
    """Of one token nothing can be read ahead, whatever the others are."""
    model, generator = make_llama(), torch.Generator().manual_seed(2)
    asked = [Question(drawn(generator, size), (drawn(generator, 3),)) for size in (1, 90)]
    found = answer(model, asked, lambda: empty_cache(model, None), 64)
    for (own,), question in zip(found, asked, strict=True):
        assert own[0] == pytest.approx(one_by_one(model, None, question)[0][0], abs=TOLERANCE)


def test_batches_are_of_about_one_length_and_of_one_beginning() -> None:
    generator = torch.Generator().manual_seed(7)
    head = drawn(generator, 64)
    alike = [head + drawn(generator, size) for size in range(1, 21)]
    others = [drawn(generator, size) for size in (300, 70, 70, 5)]
    contexts = [*others[:2], *alike, *others[2:]]
    tails: tuple[Tokens, ...] = ((1,), (2,), (3, 4))  # two rows
    asked = [Question(context, tails) for context in contexts]
    batches = in_batches(asked, 17)
    assert sorted(index for batch in batches for index in batch) == list(range(len(contexts)))
    assert max(map(len, batches)) == 8
    for batch in batches:
        assert len({contexts[index] in alike for index in batch}) == 1
        lengths = [len(contexts[index]) for index in batch]
        assert lengths == sorted(lengths, reverse=True)
    assert len(contexts[batches[0][0]]) == 300
    assert batches == in_batches(asked, 17)
    assert all(len(batch) == 1 for batch in in_batches(asked, 1))


def test_what_contexts_begin_with() -> None:
    assert _common([(1, 2, 3), (1, 2, 4), (1, 2)]) == 2
    assert _common([(1, 2, 3), (1, 2, 3)]) == 3
    assert _common([(5,), (6, 7)]) == 0
