"""Which models, calls and caches have graphs, and the slots behind them. On the CPU, where what a CUDA graph replays is
called again."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_cases import GREEDY, check_alike, log_of, plain, with_graphs
from tiny_models import FAMILIES, long_batch, make_llama

from hf_fastpath import Int4KIVICache, Int8KVCache, StaticKVCache, Unsupported, patch_model, unpatch_model
from hf_fastpath.caches import attention
from hf_fastpath.decode_graph import DecodeGraphs, batch_bucket, capacity_for


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
    for call in range(3):
        check_alike(patched, **inputs, **GREEDY)
        assert log_of(patched).count("capture") == min(call + 1, 2)  # tokens, and what chooses the first ones
    patched.model.norm.weight.data = patched.model.norm.weight.data.clone()
    check_alike(patched, **inputs, **GREEDY)
    assert log_of(patched).count("capture") == 3


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


@pytest.mark.parametrize(("batch", "rows"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (16, 16), (17, 32)])
def test_buckets(batch: int, rows: int) -> None:
    assert batch_bucket(batch) == rows


@pytest.mark.parametrize(("rows", "tokens", "capacity"), [(1, 1, 2048), (1, 2049, 4096), (16, 600, 768), (4, 0, 512)])
def test_capacities(rows: int, tokens: int, capacity: int) -> None:
    assert capacity_for(rows, tokens) == capacity


@pytest.mark.parametrize("family", ["llama", "lfm2"])
def test_a_cache_that_was_reset_begins_anew(family: str) -> None:
    """In its slot, for as many rows and for fewer, and so does the next cache there."""
    model = with_graphs(patch_model(FAMILIES[family](), weights=None, kv_cache="int8"))
    cache = Int8KVCache(model.config)
    for padding in ((0, 0), (0, 3), (0,)):
        got = model.generate(**long_batch(padding), past_key_values=cache, **GREEDY)
        assert torch.equal(got, plain(model, **long_batch(padding), **GREEDY))
        cache.reset()
    del cache
    gc.collect()
    check_alike(model, **long_batch((0, 0)), **GREEDY)
    assert len(model._fastpath.graphs.slots) == 1
