"""The decode step of generate() over slots, on the CPU: what a CUDA graph replays is here called again."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from graph_cases import GREEDY, SAMPLE, CalledAgain, FakeCapture, check_alike, log_of, plain, with_graphs
from tiny_models import FAMILIES, long_batch, make_llama
from transformers import TextStreamer
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hf_fastpath import heuristics, patch_model
from hf_fastpath.generation import filters_of
from hf_fastpath.modules import decode_head
from hf_fastpath.ops import sampling_weights
from hf_fastpath.slot import Slot
from hf_fastpath.token_choice import Filters


@pytest.mark.parametrize("kv_cache", ["int8", "fp8", "int4"])
@pytest.mark.parametrize("padding", [(5,), (0, 0, 0), (0, 7, 30)])
@pytest.mark.parametrize("how", [GREEDY, SAMPLE], ids=["greedy", "sample"])
def test_the_same_tokens(kv_cache: str, padding: tuple[int, ...], how: dict[str, Any]) -> None:
    patched = with_graphs(patch_model(make_llama(), weights=None, kv_cache=kv_cache))
    check_alike(patched, **long_batch(padding), **how)
    # 12 tokens and 11 steps; the first of each is the warm-up. What draws nothing: tests/test_token_graph.py.
    assert log_of(patched).count("capture") == (1 if how is GREEDY else 2)
    assert log_of(patched).count("replay") == (10 if how is GREEDY else 11 + 10)


@pytest.mark.parametrize("how", [GREEDY, SAMPLE], ids=["greedy", "sample"])
def test_the_head_writes_the_logits_of_steps_where_they_are_chosen_from(
    how: dict[str, Any], monkeypatch: pytest.MonkeyPatch, count_calls: Callable[[Any, str], list[tuple[Any, ...]]]
) -> None:
    monkeypatch.setattr(heuristics, "linear_16bit_supports", lambda *args: True)
    written = count_calls(decode_head, "linear_16bit_into")
    model = with_graphs(patch_model(make_llama(), scale_search="absmax", progress=False))
    wanted = {"output_logits": True, "return_dict_in_generate": True}
    for padding, options in (((0, 0, 0), wanted), ((0, 7, 30), {}), ((0, 0), {}), ((0, 0, 0, 5), {})):
        written.clear()
        check_alike(model, **long_batch(padding), **how, **options)
        (slot,) = [slot for slot in model._fastpath.graphs.slots if slot.batch == len(padding)]
        assert [tuple(call[3].shape) for call in written] == [slot.logits[: len(padding)].shape] * 11
        assert {call[3].data_ptr() for call in written} == {slot.logits.data_ptr()}
        gc.collect()


def test_one_capture_serves_other_lengths(patched: Any) -> None:
    for padding, tokens in (((0, 0, 0, 0), 70), ((0, 0, 0, 0), 33), ((0, 0, 0, 0), 130)):
        check_alike(patched, **long_batch(padding, tokens), **GREEDY)
        gc.collect()
    assert log_of(patched).count("capture") == 2
    check_alike(patched, **long_batch((0, 0, 0)), **GREEDY)
    assert log_of(patched).count("capture") == 3  # another batch, in the same slot; its first choice is a warm-up
    gc.collect()
    check_alike(patched, **long_batch((0, 3, 9)), **GREEDY)
    assert log_of(patched).count("capture") == 5  # a step with padding, and that choice
    assert len(patched._fastpath.graphs.slots) == 1


@pytest.mark.parametrize("family", ["lfm2", "lfm2_moe", "gpt2", "qwen3"])
@pytest.mark.parametrize("padding", [(0,), (0, 7, 30)])
def test_other_families(family: str, padding: tuple[int, ...]) -> None:
    model = with_graphs(patch_model(FAMILIES[family](), weights=None, kv_cache="int8"))
    for tokens in (70, 40):
        check_alike(model, **long_batch(padding, tokens), **GREEDY)
        gc.collect()
    got = check_alike(model, **long_batch(padding, 40), **GREEDY, eos_token_id=3, return_dict_in_generate=True)
    more = torch.cat([got.sequences, got.sequences[:, -3:]], 1)
    mask = torch.nn.functional.pad(long_batch(padding, 40)["attention_mask"], (0, more.shape[1] - 40), value=1)
    kept = copy.deepcopy(got.past_key_values)
    continued = model.generate(more, attention_mask=mask, past_key_values=got.past_key_values, **GREEDY)
    assert torch.equal(continued, plain(model, input_ids=more, attention_mask=mask, past_key_values=kept, **GREEDY))
    # The step, and tokens chosen with and without an end; of one row, whole tokens with and without, and the first one.
    assert log_of(model).count("capture") == 3


@pytest.mark.parametrize("padding", [(0,), (0, 7, 30)])
def test_the_h2o_cache(padding: tuple[int, ...]) -> None:
    model = with_graphs(patch_model(make_llama(), weights=None, kv_cache="h2o", kv_budget=32))
    for tokens in (70, 20, 60):
        check_alike(model, **long_batch(padding, tokens), **GREEDY)
        gc.collect()
    assert log_of(model).count("capture") >= 2
    check_alike(model, **long_batch(padding), **SAMPLE, eos_token_id=3)
    got = model.generate(**long_batch(padding), **GREEDY, eos_token_id=3, return_dict_in_generate=True)
    assert got.past_key_values.get_seq_length() == got.sequences.shape[1] - 1


HOW = {
    "processors that need the tokens": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "scores": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    "sampled scores": {**SAMPLE, "return_dict_in_generate": True, "output_scores": True},
    "num_return_sequences": {**SAMPLE, "num_return_sequences": 3},
    "min_p": {"do_sample": True, "top_k": 0, "min_p": 0.05},
    "prefill in chunks": {"prefill_chunk_size": 17},
    "a time limit": {"max_time": 1000.0},
    "one token": {"max_new_tokens": 1},
}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize("padding", [(0,), (0, 7)])
def test_what_our_loop_decodes(patched: Any, how: dict[str, Any], padding: tuple[int, ...]) -> None:
    check_alike(patched, **long_batch(padding), **(GREEDY | how))
    assert ("capture" in log_of(patched)) == (how.get("max_new_tokens") != 1)


class Recorded(TextStreamer):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.seen.append(value.tolist())

    def end(self) -> None:
        self.seen.append("end")


@pytest.mark.parametrize("how", [GREEDY, SAMPLE, {**GREEDY, "repetition_penalty": 1.2}], ids=str)
@pytest.mark.parametrize("returned", [False, True])
@pytest.mark.parametrize("padding", [(0,), (0, 4)])
def test_end_tokens(patched: Any, how: dict[str, Any], returned: bool, padding: tuple[int, ...]) -> None:
    inputs = {**long_batch(padding), **how, "max_new_tokens": 40, "return_dict_in_generate": returned}
    torch.manual_seed(1)
    tokens = patched.generate(**inputs)
    tokens = tokens.sequences if returned else tokens
    ends = sorted({int(row[70 + 9 + 3 * i]) for i, row in enumerate(tokens)})
    got = check_alike(patched, **inputs, eos_token_id=ends)
    got = got.sequences if returned else got
    assert got.shape[1] < 70 + 40
    streamers = Recorded(), Recorded()
    for call, streamer in zip((patched.generate, functools.partial(plain, patched)), streamers, strict=True):
        torch.manual_seed(1)
        call(**inputs, eos_token_id=ends, streamer=streamer)
    assert streamers[0].seen == streamers[1].seen
    assert streamers[0].seen[-1] == "end"


@pytest.mark.parametrize("how", [GREEDY, SAMPLE], ids=["greedy", "sample"])
@pytest.mark.parametrize("returned", [False, True])
@pytest.mark.parametrize("padding", [(0,), (0, 4)])
@pytest.mark.parametrize("family", ["lfm2", "lfm2_moe"])
def test_end_tokens_where_a_cache_cannot_forget_a_token(
    family: str, padding: tuple[int, ...], returned: bool, how: dict[str, Any]
) -> None:
    model = with_graphs(patch_model(FAMILIES[family](), weights=None, kv_cache="int8"))
    torch.manual_seed(1)
    ends = model.generate(**long_batch(padding), **how)[:, 76].unique().tolist()
    gc.collect()
    got = check_alike(model, **long_batch(padding), **how, eos_token_id=ends, return_dict_in_generate=returned)
    assert (got.sequences if returned else got).shape[1] < 70 + 12


def test_what_a_user_adds_is_called_as_often(patched: Any) -> None:
    """A criterion of one's own may count its calls: the loop then waits for each token."""
    inputs, calls = long_batch((0,)), []

    class Fifth(StoppingCriteria):
        def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            calls.append(ids.shape[1])
            return torch.full((ids.shape[0],), ids.shape[1] >= 75)

    check_alike(patched, **inputs, **GREEDY, stopping_criteria=[Fifth()])
    assert calls == 2 * list(range(71, 76))


@pytest.fixture
def single_token_form(patched: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """When the model is put into transformers' form for single tokens, "steps", and out of it, "end"."""
    seen: list[Any] = []

    @contextlib.contextmanager
    def for_steps(model: Any) -> Iterator[None]:
        seen.append("steps")
        yield
        seen.append("end")

    monkeypatch.setattr(type(patched), "_optimize_model_for_decode", for_steps)
    return seen


def test_the_prompt_is_not_run_as_steps_are(
    patched: Any, single_token_form: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers switches experts to an implementation for few tokens, whose memory grows with them. What is replayed
    needs no switch, which takes long; here it is called again."""
    seen = single_token_form
    forward = type(patched.model).forward

    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["input_ids"].shape[1])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(patched.model), "forward", noting)
    patched.generate(**long_batch((0,)), do_sample=False, max_new_tokens=4)
    assert seen == [70, *3 * ["steps", 1, "end"]]
    patched.generate(**long_batch((0,)), do_sample=False, max_new_tokens=1)
    assert seen[10:] == [70]


def test_steps_without_a_graph_are_all_run_as_single_tokens(
    patched: Any, single_token_form: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Slot, "holds", lambda slot, cache: False)
    patched.generate(**long_batch((0,)), do_sample=False, max_new_tokens=4)
    assert single_token_form == ["steps", "end"]


def test_in_inference_mode_and_out_of_it(patched: Any) -> None:
    inputs = long_batch((0, 3))
    want = plain(patched, **inputs, **GREEDY)
    for _ in range(2):
        with torch.inference_mode():
            assert torch.equal(patched.generate(**inputs, **GREEDY), want)
        assert torch.equal(patched.generate(**inputs, **GREEDY), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "asked",
    [{"temperature": 0.7}, {"top_k": 5}, {"top_k": 500}, {"top_p": 0.8}, {"min_p": 0.2}, {"top_k": 30, "top_p": 0.5},
     {"temperature": 2.0, "top_k": 40, "top_p": 0.95, "min_p": 0.02}],
    ids=str,
)  # fmt: skip
def test_one_op_keeps_what_transformers_processors_keep(asked: dict[str, Any], dtype: torch.dtype) -> None:
    kinds = {"temperature": TemperatureLogitsWarper, "top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper}
    kinds["min_p"] = MinPLogitsWarper
    processors = LogitsProcessorList([kinds[name](value) for name, value in asked.items()])
    filters = filters_of(processors)
    assert filters == Filters(**asked)
    logits = (torch.randn(5, 199, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    want = processors(torch.zeros(5, 1, dtype=torch.long), logits.float()).softmax(-1)
    got = sampling_weights(logits, **dataclasses.asdict(filters))
    assert torch.equal(got > 0, want > 0)
    torch.testing.assert_close(got / got.sum(-1, keepdim=True), want)


def test_other_processors_are_called_themselves() -> None:
    top_k, top_p, hot = TopKLogitsWarper(5), TopPLogitsWarper(0.5), TemperatureLogitsWarper(2.0)
    assert filters_of([]) == Filters()
    assert filters_of([hot, top_k, top_p]) is not None
    for others in (
        [top_k, hot],
        [top_p, top_k],
        [top_k, top_k],
        [TopKLogitsWarper(5, filter_value=-1e4)],
        [TopPLogitsWarper(0.5, min_tokens_to_keep=2)],
        [hot, RepetitionPenaltyLogitsProcessor(1.2)],
    ):
        assert filters_of(others) is None


class OutOfMemory(FakeCapture):
    """As many times as there are ``failures``, the memory is found short after everything was called once."""

    failures: int

    def __call__(self, call: Callable[[], None]) -> CalledAgain:
        if self.failures:
            OutOfMemory.failures -= 1
            generators = torch.get_rng_state()
            state = [tensor.clone() for tensor in self.on_gpu()]
            call()
            for tensor, before in zip(self.on_gpu(), state, strict=True):
                tensor.copy_(before)  # a capture changes nothing on the GPU
            torch.set_rng_state(generators)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().__call__(call)

    slot: Any

    def on_gpu(self) -> list[torch.Tensor]:
        slot = self.slot()
        storage = [tensor for layer in slot.cache.layers for tensor in getattr(layer, "storage", [])]
        return [*storage, *slot.state(slot.batch)]


@pytest.mark.parametrize("failures", [1, 2])
@pytest.mark.parametrize("padding", [(7,), (0, 7)])
@pytest.mark.parametrize("how", [GREEDY, SAMPLE], ids=["greedy", "sample"])
def test_without_memory_for_a_graph_there_is_none(
    patched: Any, how: dict[str, Any], padding: tuple[int, ...], failures: int
) -> None:
    inputs, graphs = long_batch(padding), patched._fastpath.graphs
    OutOfMemory.failures, OutOfMemory.slot = failures, staticmethod(lambda: graphs.slots[-1])
    graphs.new_capture = functools.partial(OutOfMemory, graphs.log)
    torch.manual_seed(1)
    want = plain(patched, **inputs, **how)
    for left in reversed(range(failures)):
        torch.manual_seed(1)
        with pytest.warns(UserWarning, match="without a CUDA graph, and slower: CUDA out of memory"):
            assert torch.equal(patched.generate(**inputs, **how), want)
        assert OutOfMemory.failures == left
        assert log_of(patched) == []
    check_alike(patched, **inputs, **how)
    assert log_of(patched).count("capture") == 2


def test_other_errors_of_a_capture_are_raised(patched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(self: Any, call: Callable[[], None]) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(FakeCapture, "__call__", capture)
    with pytest.raises(RuntimeError, match="not permitted"):
        patched.generate(**long_batch((0,)), **GREEDY)
