"""Perplexity against plain float64 arithmetic, and whether the cache is really in the loop."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import make_llama
from transformers import LlamaForCausalLM

from hf_fastpath import Int8KVCache, StaticKVCache
from hf_fastpath.eval.perplexity import SLICE, Divergence, Perplexity, perplexity, window_starts

# Logits are float32 numbers of magnitude below 2^7, so log-probabilities carry about 2^7 * 2^-24 = 8e-6 each.
NLL_TOLERANCE = 1e-4


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(2, 199, (50,), generator=torch.Generator().manual_seed(3))


def float64_nll(model: LlamaForCausalLM, window: torch.Tensor) -> torch.Tensor:
    """The negative log-likelihood of every token of ``window`` but its first."""
    with torch.no_grad():
        log_probs = torch.log_softmax(model(window[None], use_cache=False).logits[0, :-1].double(), dim=-1)
    return -log_probs.gather(1, window[1:, None])[:, 0]


def test_matches_float64_over_disjoint_windows(llama: LlamaForCausalLM, ids: torch.Tensor) -> None:
    result = perplexity(llama, ids, window=16)
    expected = torch.cat([float64_nll(llama, ids[start : start + 16]) for start in (0, 16, 32)])
    assert result.tokens == 45
    assert result.nll == pytest.approx(expected.mean().item(), abs=NLL_TOLERANCE)
    assert result.ppl == pytest.approx(math.exp(expected.mean().item()), rel=NLL_TOLERANCE)


def test_overlapping_windows_count_each_token_once_with_its_longest_seen_context(
    llama: LlamaForCausalLM, ids: torch.Tensor
) -> None:
    result = perplexity(llama, ids[:32], window=16, stride=8)
    expected = [float64_nll(llama, ids[:16])] + [float64_nll(llama, ids[s : s + 16])[-8:] for s in (8, 16)]
    torch.testing.assert_close(result.token_nll.double(), torch.cat(expected), atol=NLL_TOLERANCE, rtol=0)


def test_a_model_that_knows_nothing_scores_its_vocabulary_size(llama: LlamaForCausalLM, ids: torch.Tensor) -> None:
    torch.nn.init.zeros_(llama.lm_head.weight)
    assert perplexity(llama, ids, window=16).ppl == pytest.approx(199, rel=1e-6)


def test_more_rows_than_are_widened_at_a_time(llama: LlamaForCausalLM) -> None:
    ids = torch.randint(2, 199, (300,), generator=torch.Generator().manual_seed(4))
    expected = float64_nll(llama, ids).mean().item()
    assert perplexity(llama, ids, window=300).nll == pytest.approx(expected, abs=NLL_TOLERANCE)


def test_the_int8_cache_is_in_the_loop(llama: LlamaForCausalLM, ids: torch.Tensor) -> None:
    def quantized() -> Int8KVCache:
        return Int8KVCache(llama.config, fresh_prefill=False)

    plain = perplexity(llama, ids, window=50)
    lossless = perplexity(llama, ids, window=50, cache_factory=lambda: StaticKVCache(llama.config))
    rounded = perplexity(llama, ids, window=50, cache_factory=quantized)
    torch.testing.assert_close(lossless.token_nll, plain.token_nll, atol=NLL_TOLERANCE, rtol=0)
    assert (rounded.token_nll - plain.token_nll).abs().max() > 100 * NLL_TOLERANCE

    cache, one_by_one = quantized(), []
    with torch.no_grad():
        for token in ids:
            logits = llama(token.view(1, 1), past_key_values=cache).logits[0, -1]
            one_by_one.append(torch.log_softmax(logits.double(), dim=-1))
    decoded = -torch.stack(one_by_one[:-1]).gather(1, ids[1:, None])[:, 0]
    torch.testing.assert_close(rounded.token_nll.double(), decoded, atol=NLL_TOLERANCE, rtol=0)


def test_progress_and_max_windows(llama: LlamaForCausalLM, ids: torch.Tensor) -> None:
    calls: list[tuple[int, int]] = []
    result = perplexity(llama, ids, window=10, max_windows=2, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 2), (2, 2)]
    assert result.tokens == 18


@pytest.mark.parametrize(
    ("length", "window", "stride", "expected"),
    [(10, 4, 4, [0, 4]), (12, 4, 4, [0, 4, 8]), (10, 4, 2, [0, 2, 4, 6]), (3, 8, 8, [0])],
)
def test_window_starts(length: int, window: int, stride: int, expected: list[int]) -> None:
    assert window_starts(length, window, stride) == expected


@pytest.mark.parametrize(
    ("length", "window", "stride", "max_windows", "message"),
    [(1, 4, 4, None, "2 tokens"), (9, 1, 1, None, "window >= 2"), (9, 4, 5, None, "stride"), (9, 4, 4, 0, "1 or more")],
)
def test_bad_windows_are_named(length: int, window: int, stride: int, max_windows: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        window_starts(length, window, stride, max_windows)


def test_change_and_agreement_against_a_reference() -> None:
    reference = Perplexity.of(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5, 6, 7]))
    shifted = Perplexity.of(reference.token_nll + 0.01, torch.tensor([5, 6, 8]))
    change, error = shifted.change_from(reference)
    assert change == pytest.approx(math.expm1(0.01), rel=1e-5)
    assert change == pytest.approx(shifted.ppl / reference.ppl - 1, rel=1e-5)
    assert error == pytest.approx(0, abs=1e-6)  # every token changed alike
    assert shifted.top1_agreement(reference) == pytest.approx(2 / 3)


def test_divergence_matches_float64_and_starts_anew(llama: LlamaForCausalLM, ids: torch.Tensor) -> None:
    other = make_llama(seed=1)
    divergence = Divergence()
    perplexity(llama, ids, window=16, on_logits=divergence.remember)
    with torch.no_grad():
        windows = torch.stack([ids[start : start + 16] for start in (0, 16, 32)])
        log_p, log_q = (
            torch.log_softmax(model(windows, use_cache=False).logits[:, :-1].double(), dim=-1)
            for model in (llama, other)
        )
    expected = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    for model, divergence_of in ((other, expected), (llama, 0.0), (other, expected)):
        perplexity(model, ids, window=16, on_logits=divergence.compare)
        # fp16 log-probabilities of magnitude below 2^6 are off by 2^-6 at most, likely ones by far less, both ways.
        assert divergence.take() == pytest.approx(divergence_of, abs=2e-3)


def test_the_shipped_text_is_three_whole_articles() -> None:
    text = SLICE.read_text(encoding="utf-8")
    assert len(text.encode()) == 42_729
    titles = [line for line in text.splitlines() if line.startswith(" = ") and not line.startswith(" = =")]
    assert titles == [" = Robert Boulter = ", " = Du Fu = ", " = Kiss You ( One Direction song ) = "]


def test_tiny_models_see_their_past() -> None:
    """Guards the tests above: with positions ignored, a cache that loses tokens would go unnoticed."""
    model = make_llama()
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        changed = torch.cat([ids[:, :1] + 50, ids[:, 1:]], dim=1)
        difference = (model(ids).logits[0, -1] - model(changed).logits[0, -1]).abs().max()
    assert difference > 100 * NLL_TOLERANCE
