"""The decode step of generate() over slots, on the CPU: what a CUDA graph replays is here called again."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import pickle
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

from hf_fastpath import Int4KIVICache, Int8KVCache, StaticKVCache, Unsupported, heuristics, patch_model, unpatch_model
from hf_fastpath.caches import attention
from hf_fastpath.decode_graph import DecodeGraphs, batch_bucket, capacity_for
from hf_fastpath.generation import filters_of
from hf_fastpath.modules import decode_head
from hf_fastpath.ops import sampling_weights
from hf_fastpath.token_choice import Filters


@pytest.fixture
def patched() -> Any:
    """A patched model with graphs, which only models on a GPU use by themselves. Of the caches int4 is the one where
    most hangs on how many tokens there were."""
    return with_graphs(patch_model(make_llama(), weights=None, kv_cache="int4"))


@pytest.mark.parametrize("kv_cache", ["int8", "fp8", "int4"])
@pytest.mark.parametrize("padding", [(5,), (0, 0, 0), (0, 7, 30)])
@pytest.mark.parametrize("how", [GREEDY, SAMPLE], ids=["greedy", "sample"])
def test_the_same_tokens(kv_cache: str, padding: tuple[int, ...], how: dict[str, Any]) -> None:
    patched = with_graphs(patch_model(make_llama(), weights=None, kv_cache=kv_cache))
    check_alike(patched, **long_batch(padding), **how)
    # 12 tokens and 11 steps; the first of each is the warm-up. One row that draws nothing: tests/test_token_graph.py.
    one_graph = len(padding) == 1 and how is GREEDY
    assert log_of(patched).count("capture") == (1 if one_graph else 2)
    assert log_of(patched).count("replay") == (10 if one_graph else 11 + 10)


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
    assert log_of(patched).count("capture") == 4  # another batch, in the same slot
    gc.collect()
    check_alike(patched, **long_batch((0, 3, 9)), **GREEDY)
    assert log_of(patched).count("capture") == 5  # the step with padding; tokens are chosen as before
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


def test_a_cache_that_is_kept_keeps_its_slot(patched: Any) -> None:
    inputs = long_batch((0,))
    first = patched.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    kept = copy.deepcopy(first.past_key_values)
    check_alike(patched, **long_batch((0,), 50), **GREEDY)
    assert len(patched._fastpath.graphs.slots) == 2
    for mine, theirs in zip(first.past_key_values.layers, kept.layers, strict=True):
        assert theirs.lender is None
        assert mine.tickets is mine.lender.tickets
        assert theirs.tickets is not mine.tickets
        assert torch.equal(mine.keys, theirs.keys)
    more = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], 1)
    replays = log_of(patched).count("replay")
    continued = patched.generate(more, past_key_values=first.past_key_values, **GREEDY)
    assert log_of(patched).count("replay") > replays + 8
    assert torch.equal(continued, plain(patched, input_ids=more, past_key_values=kept, **GREEDY))
    for mine, theirs in zip(first.past_key_values.layers, kept.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys)


@pytest.mark.parametrize(
    "how",
    [{"num_beams": 2}, {"prompt_lookup_num_tokens": 2}, {"disable_compile": True}, {"use_cache": False},
     {"output_hidden_states": True, "return_dict_in_generate": True}],
    ids=lambda how: next(iter(how)),
)  # fmt: skip
def test_what_no_graph_serves_runs_as_before(patched: Any, how: dict[str, Any]) -> None:
    inputs = long_batch((0,))
    got, want = (call(**inputs, **GREEDY, **how) for call in (patched.generate, functools.partial(plain, patched)))
    if how.get("return_dict_in_generate"):
        assert len(got.hidden_states) == 12
        got, want = got.sequences, want.sequences
    assert torch.equal(got, want)
    assert log_of(patched) == []
    check_alike(patched, **inputs, **GREEDY)  # nothing is left behind
    assert log_of(patched)


def test_an_assistant(patched: Any) -> None:
    assistant = with_graphs(patch_model(make_llama(seed=1), weights=None, kv_cache="int8"))
    inputs = long_batch((0,))
    got = patched.generate(**inputs, **GREEDY, assistant_model=assistant)
    assert torch.equal(got, plain(patched, **inputs, **GREEDY, assistant_model=assistant))
    assert log_of(patched) == log_of(assistant) == []


def test_hooks_wrappers_and_foreign_caches_run_as_before(patched: Any) -> None:
    inputs, graphs = long_batch((0,)), patched._fastpath.graphs
    seen = []
    handle = patched.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    patched.generate(**inputs, **GREEDY)
    assert len(seen) == 12
    assert "hook" in graphs.why_not(patched)
    handle.remove()
    handle = patched.register_forward_pre_hook(lambda *_: seen.append(1))
    assert "hook" in graphs.why_not(patched)
    handle.remove()
    assert graphs.why_not(patched) == ""
    original = patched.model.layers[1].mlp
    patched.model.layers[1].mlp = torch.nn.Sequential(original)
    assert torch.equal(patched.generate(**inputs, **GREEDY), plain(patched, **inputs, **GREEDY))
    assert "wrapped" in graphs.why_not(patched)
    patched.model.layers[1].mlp = original
    patched.generate(**inputs, **GREEDY, past_key_values=StaticKVCache(patched.config))
    assert log_of(patched) == []
    patched.generate(**inputs, **GREEDY, cache_implementation="dynamic")
    assert log_of(patched) == []
    patched.train()
    patched.generate(**inputs, **GREEDY)
    assert log_of(patched) == []
    patched.eval()
    patched.set_attn_implementation("sdpa")
    patched.generate(**inputs, **GREEDY)
    assert log_of(patched) == []
    patched.set_attn_implementation("fastpath")
    check_alike(patched, **inputs, **GREEDY)
    assert log_of(patched)


def test_the_model_is_looked_at_once_a_call(patched: Any, count_calls: Callable[[Any, str], list[Any]]) -> None:
    asked, inputs = count_calls(DecodeGraphs, "why_not"), long_batch((0,))
    for _ in range(2):
        patched.generate(**inputs, **GREEDY)
    assert len(asked) == 2
    out = patched.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    longer = {"input_ids": torch.cat([out.sequences, torch.tensor([[7]])], 1), "past_key_values": out.past_key_values}
    before = len(log_of(patched))
    patched.generate(**longer, **GREEDY)
    assert len(asked) == 4
    assert len(log_of(patched)) > before


def test_the_prompt_is_not_run_as_steps_are(patched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers switches experts to an implementation for few tokens meanwhile, whose memory grows with them."""
    seen: list[Any] = []

    @contextlib.contextmanager
    def for_steps(model: Any) -> Iterator[None]:
        seen.append("steps")
        yield
        seen.append("end")

    monkeypatch.setattr(type(patched), "_optimize_model_for_decode", for_steps)
    forward = type(patched.model).forward

    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["input_ids"].shape[1])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(patched.model), "forward", noting)
    patched.generate(**long_batch((0,)), do_sample=False, max_new_tokens=4)
    assert seen == [70, "steps", 1, 1, 1, "end"]


def test_what_was_found_of_a_call_that_failed_is_forgotten(patched: Any) -> None:
    inputs, cache, seen = long_batch((0,)), Int8KVCache(patched.config), []
    with pytest.raises(ValueError, match="bad_words_ids"):
        patched.generate(**inputs, **GREEDY, past_key_values=cache, bad_words_ids=[[-1]])
    assert patched._fastpath.graphs.slot_behind(cache) is not None
    patched.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    patched.generate(**inputs, **GREEDY, past_key_values=cache)
    assert len(seen) == 12
    assert log_of(patched) == []


def test_an_empty_cache_of_ours_gets_a_slot(patched: Any) -> None:
    caches: list[Callable[[], Any]] = [
        lambda: Int8KVCache(patched.config),
        lambda: Int4KIVICache(patched.config, group_tokens=32),
        lambda: Int4KIVICache(patched.config, group_tokens=32, sinks=0, max_cache_len=100),
    ]
    inputs = long_batch((0, 7))
    for new in caches:
        for _ in range(2):
            got, want = new(), new()
            tokens = patched.generate(**inputs, **GREEDY, past_key_values=got)
            assert torch.equal(tokens, plain(patched, **inputs, **GREEDY, past_key_values=want))
            for mine, theirs in zip(got.layers, want.layers, strict=True):
                assert torch.equal(mine.keys, theirs.keys)
            assert patched._fastpath.graphs.slot_of(got) is not None
            del got
            gc.collect()
    assert len(patched._fastpath.graphs.slots) == 3


@torch.no_grad()
def test_attention_that_a_graph_would_get_wrong_is_refused(patched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = patched(**long_batch((0,))).past_key_values
    patched(torch.tensor([[5]]), past_key_values=cache)
    monkeypatch.setattr(attention, "is_capturing", lambda device: True)
    patched(torch.tensor([[5]]), past_key_values=cache)
    with pytest.raises(Unsupported, match="CUDA graph"):
        patched(torch.tensor([[5]]), past_key_values=cache, is_causal=False)


def test_another_format_by_its_name_has_a_slot_of_its_own(patched: Any) -> None:
    for _ in range(2):
        for name in ("fastpath_int8", "fastpath_fp8"):
            check_alike(patched, **long_batch((0,)), **GREEDY, cache_implementation=name)
            gc.collect()
    assert len(patched._fastpath.graphs.slots) == 2


def test_weights_that_were_moved_are_captured_anew(patched: Any) -> None:
    inputs = long_batch((0, 0))
    check_alike(patched, **inputs, **GREEDY)
    captures = log_of(patched).count("capture")
    check_alike(patched, **inputs, **GREEDY)
    assert log_of(patched).count("capture") == captures
    patched.model.norm.weight.data = patched.model.norm.weight.data.clone()
    check_alike(patched, **inputs, **GREEDY)
    assert log_of(patched).count("capture") == 2 * captures


def test_a_cache_that_outgrows_its_slot_goes_on_without(patched: Any) -> None:
    inputs, graphs = long_batch((0,)), patched._fastpath.graphs
    first = patched.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    graphs.slots[0].capacity = 80  # 70 of the prompt, 4 new ones
    kept = copy.deepcopy(first.past_key_values)
    got = patched.generate(first.sequences, past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(got, plain(patched, input_ids=first.sequences, past_key_values=kept, **GREEDY))


def test_a_longer_call_gets_a_larger_slot(patched: Any) -> None:
    for tokens in (70, 2100):
        check_alike(patched, **long_batch((0,), tokens), **GREEDY)
        gc.collect()
    assert [slot.capacity for slot in patched._fastpath.graphs.slots] == [4096]


def test_in_inference_mode_and_out_of_it(patched: Any) -> None:
    inputs = long_batch((0, 3))
    want = plain(patched, **inputs, **GREEDY)
    for _ in range(2):
        with torch.inference_mode():
            assert torch.equal(patched.generate(**inputs, **GREEDY), want)
        assert torch.equal(patched.generate(**inputs, **GREEDY), want)


def test_copies_have_graphs_of_their_own(patched: Any) -> None:
    inputs = long_batch((0,))
    want = patched.generate(**inputs, **GREEDY)
    twin = copy.deepcopy(patched)
    assert twin._fastpath.graphs.slots == []
    with_graphs(twin)
    patched._fastpath.graphs = None
    assert torch.equal(twin.generate(**inputs, **GREEDY), want)
    assert log_of(twin)
    assert pickle.loads(pickle.dumps(DecodeGraphs())).slots == []
    unpatch_model(twin)
    assert "_fastpath" not in twin.__dict__


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
        return [*storage, *slot.state]


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


@pytest.mark.parametrize(("batch", "rows"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (16, 16), (17, 32)])
def test_buckets(batch: int, rows: int) -> None:
    assert batch_bucket(batch) == rows


@pytest.mark.parametrize(("rows", "tokens", "capacity"), [(1, 1, 2048), (1, 2049, 4096), (16, 600, 768), (4, 0, 512)])
def test_capacities(rows: int, tokens: int, capacity: int) -> None:
    assert capacity_for(rows, tokens) == capacity
