"""One graph for a whole token, the model's step and the choice behind it, where nothing is drawn.

On the CPU, where what a CUDA graph replays is called again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_cases import GREEDY, SAMPLE, check_alike, log_of, plain, with_graphs
from tiny_models import FAMILIES, long_batch
from transformers import TextStreamer

from hf_fastpath import capture, patch_model
from hf_fastpath.slot import Slot

FLAGS = {**GREEDY, "return_dict_in_generate": True}


def patched(family: str = "llama", kv_cache: str = "int8", **options: Any) -> Any:
    return with_graphs(patch_model(FAMILIES[family](), weights=None, kv_cache=kv_cache, **options))


def names(model: Any) -> list[str]:
    """What was captured."""
    return sorted(name for slot in model._fastpath.graphs.slots for name, _ in slot.captured)


def replays(model: Any, call: Callable[[], Any]) -> int:
    before = log_of(model).count("replay")
    call()
    return log_of(model).count("replay") - before


@pytest.mark.parametrize("padding", [(0,), (5,), (0, 0), (0, 3, 9)])
def test_one_graph_a_token(padding: tuple[int, ...]) -> None:
    model, inputs = patched(), long_batch(padding)

    def generate() -> None:
        check_alike(model, **inputs, **GREEDY)

    assert replays(model, generate) == 10  # of 11 steps; the first is the warm-up, and so is the only choice
    assert names(model) == ["token"]
    assert replays(model, generate) == 1 + 11
    assert names(model) == ["choice", "token"]
    assert replays(model, generate) == 1 + 11
    assert log_of(model).count("capture") == 2


@pytest.mark.parametrize(
    ("padding", "how"),
    [((0,), SAMPLE), ((0, 3, 9), SAMPLE), ((0,), {**FLAGS, "output_logits": True}),
     ((0, 0), {**GREEDY, "repetition_penalty": 1.2})],
    ids=str,
)  # fmt: skip
def test_what_has_none(padding: tuple[int, ...], how: dict[str, Any]) -> None:
    model = patched()
    for _ in range(3):
        check_alike(model, **long_batch(padding), **how)
    assert "token" not in names(model)
    assert names(model).count("step") == 1


@pytest.mark.parametrize("lengths", [(1, 2, 3, 12), (2, 1, 12), (3, 2, 12, 1), (1, 1, 1, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("padding", [(0,), (5,)])
def test_calls_of_few_tokens(lengths: tuple[int, ...], padding: tuple[int, ...]) -> None:
    model = patched(kv_cache="int4")
    for turn, new in enumerate(lengths):
        inputs = long_batch(padding, 70 - 20 * (turn % 2))
        got = check_alike(model, **inputs, **(FLAGS | {"max_new_tokens": new}))
        (slot,) = model._fastpath.graphs.slots
        assert int(slot.count) == new
        assert got.past_key_values.get_seq_length() == got.sequences.shape[1] - 1
        del got


@pytest.mark.parametrize("kv_cache", ["int8", "fp8", "int4", "h2o", "static"])
@pytest.mark.parametrize("family", ["llama", "lfm2", "lfm2_moe", "gpt2", "qwen3"])
def test_families_and_caches(family: str, kv_cache: str) -> None:
    options = {"kv_budget": 32} if kv_cache == "h2o" else {}
    model = patched(family, kv_cache, **options)
    for padding, tokens in (((0,), 70), ((5,), 33), ((0,), 50)):
        check_alike(model, **long_batch(padding, tokens), **GREEDY)
    assert (names(model).count("token") == 2) == (kv_cache != "static")  # with padding and without
    ends = [int(model.generate(**long_batch((0,)), **GREEDY)[0, 76])]
    check_alike(model, **long_batch((0,)), **GREEDY, eos_token_id=ends)


class Recorded(TextStreamer):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.seen.append(value.tolist())

    def end(self) -> None:
        self.seen.append("end")


@pytest.mark.parametrize("kv_cache", ["int4", "h2o"])  # the second cannot take a token back
@pytest.mark.parametrize("returned", [False, True])
def test_steps_and_tokens_of_a_call_that_an_end_token_stops(
    kv_cache: str, returned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = patched(kv_cache=kv_cache), long_batch((5,))
    tokens = plain(model, **inputs, **GREEDY)[0, 70:].tolist()
    steps: list[int] = []
    step = Slot.step
    monkeypatch.setattr(Slot, "step", lambda *args, **named: (steps.append(1), step(*args, **named)))
    for place in (0, 1, 2, 7, 11):
        how = {**GREEDY, "eos_token_id": tokens[place], "return_dict_in_generate": returned}
        stop = tokens.index(tokens[place]) + 1
        for _ in range(3):
            steps.clear()
            streamers, found = (Recorded(), Recorded()), []
            for call, streamer in zip((model.generate, lambda **named: plain(model, **named)), streamers, strict=True):
                out = call(**inputs, **how, streamer=streamer)
                found.append(out.sequences if returned else out)
                if returned:
                    assert out.past_key_values.get_seq_length() == 70 + stop - 1
                del out
            late = 0 if stop == 12 or (returned and kv_cache == "h2o") else 1
            assert len(steps) == stop - 1 + late
            assert torch.equal(found[0], found[1])
            assert found[0].shape[1] == 70 + stop
            assert streamers[0].seen == streamers[1].seen


@pytest.mark.parametrize("family", ["llama", "lfm2_moe"])
def test_ways_and_batches_in_turn(family: str) -> None:
    model = patched(family, "int4")
    ways = (GREEDY, SAMPLE, {**GREEDY, "eos_token_id": 5}, {**GREEDY, "repetition_penalty": 1.2}, GREEDY)
    for turn in range(2):
        for how in ways:
            for padding in ((0,), (0, 0), (7,), (0, 4)):
                check_alike(model, **long_batch(padding, 60 + turn), **(how | {"max_new_tokens": 5 - turn}))
    # Of one row with padding and without: tokens with an end and without, steps; two ways to choose and to draw.
    one = [name for slot in model._fastpath.graphs.slots if slot.rows == 1 for name, _ in slot.captured]
    assert sorted(one) == ["choice"] * 3 + ["step"] * 2 + ["token"] * 4


@pytest.mark.parametrize("padding", [(0,), (7,)])
@pytest.mark.parametrize(("family", "kv_cache"), [("llama", "int4"), ("llama", "int8"), ("lfm2_moe", "int8")])
def test_a_returned_cache_goes_on(family: str, kv_cache: str, padding: tuple[int, ...]) -> None:
    model, inputs = patched(family, kv_cache), long_batch(padding)
    end = int(model.generate(**inputs, **GREEDY)[0, 76])
    for eos in (None, end):  # what stops a token late is cropped, where the cache can
        got = model.generate(**inputs, **FLAGS, eos_token_id=eos)
        ids, cache, mask = got.sequences, got.past_key_values, inputs["attention_mask"]
        for how in (GREEDY, SAMPLE, {**GREEDY, "max_new_tokens": 1}, {**GREEDY, "max_new_tokens": 2}, GREEDY):
            ids = torch.cat([ids, ids[:, -3:] % 190 + 2], 1)
            mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
            kept = copy.deepcopy(cache)
            torch.manual_seed(1)
            now = model.generate(ids, attention_mask=mask, past_key_values=cache, **how)
            assert model._fastpath.graphs.slot_of(cache) is not None
            torch.manual_seed(1)
            want = plain(model, input_ids=ids, attention_mask=mask, past_key_values=kept, **how)
            assert torch.equal(now, want)
            assert cache.get_seq_length() == kept.get_seq_length() == now.shape[1] - 1
            ids = now
        del got, cache
    assert "token" in names(model)


def test_a_cache_that_outgrows_its_slot_goes_on_without() -> None:
    model, inputs = patched(kv_cache="int4"), long_batch((0,))
    first = model.generate(**inputs, **(FLAGS | {"max_new_tokens": 4}))
    model._fastpath.graphs.slots[0].capacity = 80  # 70 of the prompt, 4 new ones: 7 steps of 11 fit
    kept = copy.deepcopy(first.past_key_values)
    got = model.generate(first.sequences, past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(got, plain(model, input_ids=first.sequences, past_key_values=kept, **GREEDY))


def test_graphs_of_many_end_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many are kept as may be."""
    monkeypatch.setattr(capture, "MAX_GRAPHS", 3)
    model = patched()
    for end in (5, 6, 7, 8, 5, 6):
        for _ in range(2):
            check_alike(model, **long_batch((0,)), **GREEDY, eos_token_id=[end])
        assert len(names(model)) <= 3
        assert names(model).count("token") >= 1
