"""Bytes and rates of a model, stock and patched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import make_llama
from transformers import DynamicCache, LlamaForCausalLM

from hf_fastpath import Int8KVCache, fastpath_report, patch_model
from hf_fastpath.eval import measure


def test_tied_weights_count_once() -> None:
    untied, tied = make_llama(tie_word_embeddings=False), make_llama(tie_word_embeddings=True)
    head = 199 * 64 * 4
    assert measure.weight_bytes(untied) - measure.weight_bytes(tied) == head
    buffers = sum(buffer.nbytes for buffer in untied.buffers())
    assert measure.weight_bytes(untied) == sum(p.nbytes for p in untied.parameters()) + buffers


def test_patched_bytes_are_what_is_stored() -> None:
    model = make_llama(torch.bfloat16)
    before = measure.weight_bytes(model)
    patch_model(model, group_size=32, progress=False)
    report = fastpath_report(model)
    assert (before, measure.weight_bytes(model)) == (report.bytes_before, report.bytes_after)
    model(torch.arange(5)[None])  # the layers take the layout of the CPU's product
    # Nothing is stored twice: int4 codes in either layout take half a byte, up to padding of these tiny shapes.
    assert measure.weight_bytes(model) < 1.5 * report.bytes_after
    assert measure.weight_bytes(model) < before


def test_cache_bytes_per_token(llama: LlamaForCausalLM) -> None:
    heads = 2 * 2 * 2  # layers, keys and values, KV heads
    assert measure.cache_bytes_per_token(llama, DynamicCache(config=llama.config)) == heads * 16 * 4
    assert measure.cache_bytes_per_token(llama, Int8KVCache(llama.config)) == heads * (16 + 2)


class Clockwork:
    """A model whose generate() takes 5 s for the prompt and 0.25 s for each token after the first, by a fake clock."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.now = 0.0
        self.generated: list[int] = []

    def generate(self, max_new_tokens: int, min_new_tokens: int, **options: Any) -> None:
        assert max_new_tokens == min_new_tokens
        assert options["do_sample"] is False
        self.generated.append(max_new_tokens)
        self.now += 5 + 0.25 * (max_new_tokens - 1)


def test_decode_rate_leaves_the_prompt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Clockwork()
    monkeypatch.setattr(measure.time, "perf_counter", lambda: model.now)
    rate = measure.decode_rates(model, {}, new_tokens=9, runs=2)
    assert (rate.slowest, rate.median, rate.fastest, rate.spread) == pytest.approx((4.0, 4.0, 4.0, 0.0))
    assert model.generated == [2, 9, 1, 9, 1]


def test_the_rate_is_the_median_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Clockwork()
    waits = iter((0.0, 4.0, 0.0, 0.0, 0.0, 2.0, 0.0))  # the warm-up, then pairs of a long and a short run
    monkeypatch.setattr(measure.time, "perf_counter", lambda: model.now)
    generate = model.generate

    def slowed(**options: Any) -> None:
        model.now += next(waits)
        generate(**options)

    monkeypatch.setattr(model, "generate", slowed)
    rate = measure.decode_rates(model, {}, new_tokens=9, runs=3)
    assert (rate.slowest, rate.median, rate.fastest) == pytest.approx((8 / 6, 8 / 4, 8 / 2))
    assert rate.spread == pytest.approx((8 / 2 - 8 / 6) / 2)


@pytest.mark.parametrize(("new_tokens", "runs"), [(1, 1), (8, 0)])
def test_a_rate_needs_two_tokens_and_a_run(new_tokens: int, runs: int) -> None:
    with pytest.raises(ValueError, match="allowed are"):
        measure.decode_rate(Clockwork(), {}, new_tokens=new_tokens, runs=runs)


def test_float32_parameters_are_put_back_bit_for_bit() -> None:
    model = make_llama(torch.bfloat16, tie_word_embeddings=True)
    before = {name: (id(value), value.detach().clone()) for name, value in model.named_parameters()}
    with measure.float32_parameters(model):
        assert {value.dtype for value in model.parameters()} == {torch.float32}
        assert model(torch.tensor([[3, 4, 5]])).logits.dtype == torch.float32
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {name: id(value) for name, value in model.named_parameters()} == {n: v[0] for n, v in before.items()}
    assert all(torch.equal(value, before[name][1]) for name, value in model.named_parameters())
