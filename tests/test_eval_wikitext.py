"""Perplexity by the published convention, against an independent computation and by the parts of several processes."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from tiny_models import make_llama, make_tokenizer
from transformers import DynamicCache

from hf_fastpath import FastpathConfig, patch_model
from hf_fastpath.eval.compare import empty_cache
from hf_fastpath.eval.perplexity import SLICE
from hf_fastpath.eval.processes import Processes
from hf_fastpath.eval.task_data import join_rows
from hf_fastpath.eval.wikitext import StockPredictions, Text, TextScore, score_text

WORDS = re.sub(r"[^a-z ]", " ", SLICE.read_text(encoding="utf-8").lower())[:3000]


def as_words(text: str) -> str:
    """Letters apart, each a word that the tiny tokenizer knows: text whose tokens differ."""
    return " ".join(character * (1 + place % 3) for place, character in enumerate(text) if character != " ")


@pytest.fixture
def text() -> Text:
    return Text.read(make_tokenizer(), as_words(WORDS), window=90, most=7)


def test_stock_is_the_straightforward_computation(text: Text) -> None:
    """The whole of the published recipe once more, in float64, without any of our code."""
    model, tokenizer = make_llama(), make_tokenizer()
    ids = tokenizer(as_words(WORDS)).input_ids
    total, count = 0.0, 0
    for start in range(0, 7 * 90, 90):
        window = torch.tensor(ids[start : start + 90])
        with torch.no_grad():
            log_p = model(window[None], use_cache=False).logits[0].double().log_softmax(-1)
        for place in range(1, 90):
            total, count = total - float(log_p[place - 1, window[place]]), count + 1
    found = score_text(model, text, lambda: DynamicCache(config=model.config), batch_size=3)
    assert found.predictions == count == 7 * 89
    assert found.token_perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    words, size = len(as_words(WORDS).split()), len(as_words(WORDS).encode())
    assert found.word_perplexity == pytest.approx(math.exp(total / count * len(ids) / words), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(total / count * len(ids) / size / math.log(2), rel=1e-5)


def test_every_cache_is_compared_with_stock_in_the_first_windows(text: Text) -> None:
    stock, rate, model = StockPredictions(), {}, make_llama()
    reference = score_text(model, text, lambda: DynamicCache(config=model.config), stock=stock, compared=3)
    assert (reference.kl, reference.top1, reference.compared) == (None, None, 0)
    for kv_cache in ("static", "int8", "int4"):
        config = FastpathConfig(weights=None, kv_cache=kv_cache, progress=False)  # type: ignore[arg-type]
        patched = patch_model(make_llama(), config)
        found = score_text(patched, text, lambda: empty_cache(patched, config), stock=stock, compared=3)  # noqa: B023
        assert found.kl is not None
        assert found.top1 is not None
        assert found.compared == 3 * 89
        rate[kv_cache] = (found.kl, 1 - found.top1, abs(found.change_from(reference)[0]))
    # fp16 log-probabilities of the reference, of magnitude below 2^6, are off by 2^-6 at most, likely ones by far less.
    assert rate["static"][0] < 1e-3
    assert rate["static"][1:] == pytest.approx((0, 0), abs=1e-5)
    assert 1e-3 < rate["int8"][0] < rate["int4"][0]


def test_windows_of_two_processes_are_those_of_one(text: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama()
    parts: list[Any] = []

    def share(rank: int) -> TextScore:
        processes = Processes()
        processes.count, processes.rank = 2, rank
        monkeypatch.setattr(processes, "gather", lambda mine: parts.append(mine) or [*parts])
        return score_text(model, text, lambda: DynamicCache(config=model.config), processes=processes)

    first, both = share(0), share(1)
    alone = score_text(model, text, lambda: DynamicCache(config=model.config))
    assert len(first.window_nll) == 4
    assert both == alone


def test_change_is_of_the_perplexity_with_windows_paired() -> None:
    stock = TextScore((1.0, 2.0, 3.0), 30, 1.5, 0.3)
    other = TextScore((1.1, 2.1, 3.1), 30, 1.5, 0.3)
    change, error = other.change_from(stock)
    assert change == pytest.approx(other.token_perplexity / stock.token_perplexity - 1)
    assert error == pytest.approx(0, abs=1e-12)  # every window changed alike
    assert TextScore((1.0,), 10, 1.5, 0.3).change_from(TextScore((1.0,), 10, 1.5, 0.3)) == (0.0, None)
    assert TextScore.from_dict(other.to_dict()) == other


def test_windows_are_disjoint_and_within_what_the_model_reads() -> None:
    tokenizer = make_tokenizer()
    whole = Text.read(tokenizer, "a b c d e f g h", window=3)
    assert whole.windows.tolist() == torch.tensor(tokenizer("a b c d e f").input_ids).view(2, 3).tolist()
    assert (whole.tokens, whole.words, whole.bytes) == (8, 8, 15)
    assert Text.read(tokenizer, "a b c d e f g h", window=8, limit=4, most=1).windows.shape == (1, 4)
    assert Text.read(tokenizer, "a b c").windows.shape == (1, 3)  # shorter than a window
    for words, window, most in (("a", 5, None), ("a b", 1, None), ("a b", 5, 0)):
        with pytest.raises(ValueError, match=r"at least 2 tokens|window >= 2 and windows >= 1"):
            Text.read(tokenizer, words, window=window, most=most)


def test_rows_are_joined_as_the_hubs_are() -> None:
    assert join_rows(" \n = A = \n \n Text . \n \n") == "\n\n = A = \n\n\n\n\n Text . \n\n\n"
