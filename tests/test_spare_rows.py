"""Steps that all batches of a slot share, on the CPU: the rows that a batch leaves over change nothing."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from graph_cases import GREEDY, SAMPLE, check_alike, plain, with_graphs
from tiny_models import FAMILIES, long_batch
from torch import nn

from hf_fastpath import Int8KVCache, heuristics, patch_model
from hf_fastpath.caches.h2o import H2OKVLayer
from hf_fastpath.caches.layer import FastLayer
from hf_fastpath.heuristics import Experts16Variant, W4A16Variant
from hf_fastpath.modules import experts16
from hf_fastpath.spare_rows import SpareRows, keeps_row_bits, spare_rows_of

SHARED = (SpareRows.EMPTY, SpareRows.REPEATED)
PADDING = (0, 7, 30, 1, 0, 0, 12, 3, 0, 69, 0, 5, 0, 0, 2, 1)
QUICK = {"progress": False, "scale_search": "absmax"}


def sharing(spare: SpareRows, kv_cache: str = "int8", family: str = "llama") -> Any:
    options = {"kv_budget": 32} if kv_cache == "h2o" else {}
    return with_graphs(patch_model(FAMILIES[family](), weights=None, kv_cache=kv_cache, **options), spare)


def captured(model: Any) -> list[str]:
    return [name for slot in model._fastpath.graphs.slots for name, _ in slot.captured]


def check_spare_rows(model: Any, batch: int, prompt: int, steps: int) -> None:
    """After so many steps behind a prompt."""
    slot = model._fastpath.graphs.slots[-1]
    spare = slot.rows - batch
    for layer in slot.cache.layers:
        counts = layer.zero_if_empty.flatten(1)
        if slot.spare is SpareRows.REPEATED:
            held = [counts]
            if isinstance(layer, FastLayer) and not isinstance(layer, H2OKVLayer):
                held += [layer.expand(which, prompt + steps, layer.dtype) for which in ("keys", "values")]
            for rows in held:  # those of one product on a CPU may differ by a rounding, which can move a code by one
                torch.testing.assert_close(rows[batch:], rows[:spare], rtol=0.1, atol=0.1 * float(rows.max()))
        elif isinstance(layer, FastLayer):
            assert counts[:, 0].tolist() == [prompt + steps] * batch + [steps] * spare
    if slot.spare is SpareRows.REPEATED:
        assert torch.equal(slot.ids[batch:], slot.ids[:spare])
        assert torch.equal(slot.positions[batch:], slot.positions[:spare])


@pytest.mark.parametrize("spare", SHARED)
def test_batches_of_a_slot_share_a_step(spare: SpareRows) -> None:
    model = sharing(spare)
    for batch in (6, 5, 8, 7, 6):
        check_alike(model, **long_batch((0,) * batch), **GREEDY)
        gc.collect()
    assert sorted(captured(model)) == ["choice", "token"]
    check_alike(model, **long_batch((0, 0, 0)), **GREEDY)
    gc.collect()
    check_alike(model, **long_batch((0, 0, 0, 0)), **GREEDY)
    gc.collect()
    assert captured(model).count("token") == 2
    check_alike(model, **long_batch((0, 9, 0)), **GREEDY)  # with padding
    assert captured(model).count("token") == 3


@pytest.mark.parametrize("spare", SHARED)
def test_draws_are_of_one_batch_size(spare: SpareRows) -> None:
    model = sharing(spare)
    for batch in (6, 5, 8, 7, 6):
        check_alike(model, **long_batch((0,) * batch), **SAMPLE)
        gc.collect()
    assert sorted(captured(model)) == ["choice"] * 4 + ["step"]
    check_alike(model, **long_batch((0,) * 5), **GREEDY)
    check_alike(model, **long_batch((0,) * 5), **SAMPLE)
    assert sorted(captured(model)) == ["choice"] * 4 + ["step", "token"]


@pytest.mark.parametrize("spare", SHARED)
@pytest.mark.parametrize("batch", [3, 5, 7, 8])
@pytest.mark.parametrize(("family", "kv_cache"), [("llama", "int8"), ("lfm2_moe", "int4")])
def test_rows_end_one_by_one(family: str, kv_cache: str, batch: int, spare: SpareRows) -> None:
    """A row that nobody has does not keep the others from being finished, nor ends for them."""
    model, inputs = sharing(spare, kv_cache, family), long_batch(PADDING[:batch])
    tokens = plain(model, **inputs, **GREEDY)[:, 70:]
    for place in (0, 4, 9):
        ends = sorted({int(tokens[row, max(place - row, 0)]) for row in range(batch)})
        for end in (ends, ends[:1]):
            got = check_alike(model, **inputs, **GREEDY, eos_token_id=end)
            assert end is not ends or got.shape[1] < 70 + 12
            gc.collect()


@pytest.mark.parametrize(
    ("family", "kv_cache", "spare", "how"),
    [
        ("llama", "int8", SpareRows.EMPTY, GREEDY),
        ("llama", "fp8", SpareRows.EMPTY, GREEDY),
        ("llama", "int4", SpareRows.EMPTY, SAMPLE),
        ("llama", "h2o", SpareRows.EMPTY, GREEDY),
        ("llama", "int4", SpareRows.REPEATED, GREEDY),
        ("llama", "h2o", SpareRows.REPEATED, SAMPLE),
        ("lfm2", "int8", SpareRows.EMPTY, GREEDY),
        ("lfm2_moe", "fp8", SpareRows.REPEATED, SAMPLE),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_batch_gets_the_tokens_of_a_step_of_its_own(
    family: str, kv_cache: str, spare: SpareRows, how: dict[str, Any]
) -> None:
    model = sharing(spare, kv_cache, family)
    for batch in (3, 16, 1, 9, 13, 4, 2, 5, 7, 8, 10, 12, 11, 14, 15, 6, 3):
        padding = PADDING[:batch] if batch % 3 else (0,) * batch
        check_alike(model, **long_batch(padding, 70 - batch), **(how | {"max_new_tokens": 6}))
        check_spare_rows(model, batch, 70 - batch, 5)
        gc.collect()
    # One row has no padding.
    assert captured(model).count("token" if how is GREEDY else "step") <= 9


@pytest.mark.parametrize("batch", [3, 5, 8])
@pytest.mark.parametrize("family", ["qwen3", "lfm2", "lfm2_moe"])
def test_the_steps_of_a_gpu(family: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heuristics, "w4a16_variant", lambda *args: W4A16Variant.REFERENCE)
    monkeypatch.setattr(heuristics, "fuses_decoder_step", lambda device: True)
    spare = SpareRows.REPEATED if family == "lfm2_moe" else SpareRows.EMPTY
    model = with_graphs(patch_model(FAMILIES[family](), kv_cache="int8", **QUICK), spare)
    for padding in ((0,) * batch, PADDING[:batch]):
        check_alike(model, **long_batch(padding), **GREEDY)
        check_spare_rows(model, batch, 70, 11)
        gc.collect()


@pytest.mark.parametrize(
    ("kv_cache", "spare"),
    [("int4", SpareRows.EMPTY), ("int4", SpareRows.REPEATED), ("h2o", SpareRows.EMPTY)],
    ids=["int4", "int4, repeated", "h2o"],
)
def test_to_the_end_of_a_slot_and_again(kv_cache: str, spare: SpareRows) -> None:
    """Where a token too many in a row that nobody has would be a fault."""
    model = sharing(spare, kv_cache)
    for batch in (8, 5):
        inputs = long_batch((0,) * batch, 6)
        got = model.generate(**inputs, do_sample=False, max_new_tokens=251)
        assert batch == 8 or torch.equal(got, plain(model, **inputs, do_sample=False, max_new_tokens=251))
        (slot,) = model._fastpath.graphs.slots
        assert slot.capacity == 256
        assert all(int(layer.zero_if_empty.max()) == 256 for layer in slot.cache.layers)
        gc.collect()


@pytest.mark.parametrize("spare", SHARED)
@pytest.mark.parametrize("padding", [(0, 0, 0), (0, 7, 30)])
@pytest.mark.parametrize(("family", "kv_cache"), [("llama", "int4"), ("llama", "int8"), ("lfm2_moe", "int8")])
def test_a_returned_cache_goes_on(family: str, kv_cache: str, padding: tuple[int, ...], spare: SpareRows) -> None:
    model, flags = sharing(spare, kv_cache, family), {**GREEDY, "return_dict_in_generate": True}
    inputs = long_batch(padding)
    ends = model.generate(**inputs, **GREEDY)[:, 76].unique().tolist()
    gc.collect()
    for end in (None, ends):  # what stops a token late is cropped, where the cache can
        got = model.generate(**inputs, **flags, eos_token_id=end)
        ids, cache, mask = got.sequences, got.past_key_values, inputs["attention_mask"]
        for turn in range(2):
            ids = torch.cat([ids, ids[:, -3:] % 190 + 2], 1)
            mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
            kept = copy.deepcopy(cache)
            now = model.generate(ids, attention_mask=mask, past_key_values=cache, **flags)
            assert model._fastpath.graphs.slot_of(cache) is not None
            want = plain(model, input_ids=ids, attention_mask=mask, past_key_values=kept, **GREEDY)
            assert torch.equal(now.sequences, want), turn
            check_spare_rows(model, 3, cache.get_seq_length() - 11, 11)
            ids = now.sequences
        del got, cache, now
        gc.collect()


@pytest.mark.parametrize("spare", SHARED)
@pytest.mark.parametrize("padding", [(0, 0, 0), (0, 7, 30)])
def test_ways_that_choose_call_by_call(padding: tuple[int, ...], spare: SpareRows) -> None:
    model = sharing(spare, "int8", "lfm2_moe")
    for how in ({"repetition_penalty": 1.3}, {**SAMPLE, "no_repeat_ngram_size": 2}, {"prefill_chunk_size": 17}):
        check_alike(model, **long_batch(padding), **(GREEDY | how))
        check_spare_rows(model, 3, 70, 11)
        gc.collect()


def test_a_slot_of_a_cache_that_recorded_its_past() -> None:
    """Whose steps are none of ours; those of the next cache in its slot are."""
    model = sharing(SpareRows.EMPTY, "int8", "lfm2")
    inputs = long_batch((0, 0, 0))
    want = plain(model, **inputs, **GREEDY)
    cache = Int8KVCache(model.config)
    cache.activate_past_recording()
    assert torch.equal(model.generate(**inputs, **GREEDY, past_key_values=cache), want)
    assert captured(model) == []
    del cache
    gc.collect()
    check_alike(model, **inputs, **GREEDY)
    assert len(model._fastpath.graphs.slots) == 1
    assert not any(layer.record_past for layer in model._fastpath.graphs.slots[0].cache.layers[::2])


@pytest.mark.parametrize("spare", SHARED)
def test_in_inference_mode_and_out_of_it(spare: SpareRows) -> None:
    model, inputs = sharing(spare, "int4", "lfm2_moe"), long_batch((0, 3, 1))
    want = plain(model, **inputs, **GREEDY)
    for _ in range(2):
        with torch.inference_mode():
            assert torch.equal(model.generate(**inputs, **GREEDY), want)
        assert torch.equal(model.generate(**inputs, **GREEDY), want)


def test_more_rows_have_graphs_of_their_own_number() -> None:
    model = sharing(SpareRows.EMPTY)
    for batch in (17, 20):
        check_alike(model, **long_batch((0,) * batch), **GREEDY)
        gc.collect()
    assert captured(model).count("token") == 2
    assert [slot.spare for slot in model._fastpath.graphs.slots] == [SpareRows.NONE]


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU takes the ways of a GPU, as far as they are asked for and not gone."""
    for name in ("fuses_decoder_step", "linear_16bit_supports", "rms_norm_supports"):
        monkeypatch.setattr(heuristics, name, lambda *args: True)
    monkeypatch.setattr(experts16, "experts16_variant", lambda *args: Experts16Variant.OP)


@pytest.mark.usefixtures("like_a_gpu")
@pytest.mark.parametrize("weights", ["w4a16", "w16a16"])
@pytest.mark.parametrize(
    ("family", "spare"),
    [("llama", SpareRows.EMPTY), ("mistral", SpareRows.EMPTY), ("qwen2", SpareRows.EMPTY), ("qwen3", SpareRows.EMPTY),
     ("lfm2", SpareRows.EMPTY), ("lfm2_moe", SpareRows.REPEATED), ("gpt2", SpareRows.NONE)],
)  # fmt: skip
def test_families_that_share_steps(family: str, spare: SpareRows, weights: str) -> None:
    model = FAMILIES[family](torch.bfloat16)
    assert spare_rows_of(model) is SpareRows.NONE
    patch_model(model, weights=weights, kv_cache="int8", **({} if weights == "w16a16" else QUICK))
    assert with_graphs(model)._fastpath.graphs.spare is spare


def test_no_family_does_where_products_are_not_ours() -> None:
    for family in ("llama", "lfm2", "lfm2_moe", "gpt2"):
        for weights in ("w4a16", None):
            model = patch_model(FAMILIES[family](torch.bfloat16), weights=weights, kv_cache="int8", **QUICK)
            assert spare_rows_of(model) is SpareRows.NONE


@pytest.mark.usefixtures("like_a_gpu")
def test_one_part_that_is_not_ours_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    def patched(family: str = "llama", **options: Any) -> Any:
        return patch_model(FAMILIES[family](torch.bfloat16), kv_cache="int8", **(QUICK | options))

    assert spare_rows_of(patched(weights=None)) is SpareRows.NONE
    assert spare_rows_of(patched(skip_modules=("q_proj",))) is SpareRows.NONE
    left = patched("lfm2_moe", skip_modules=("experts",))
    assert spare_rows_of(left) is SpareRows.REPEATED
    monkeypatch.setattr(experts16, "experts16_variant", lambda *args: Experts16Variant.TRANSFORMERS)
    assert spare_rows_of(left) is SpareRows.NONE
    model = patched()
    assert spare_rows_of(model) is SpareRows.EMPTY
    hook = model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert spare_rows_of(model) is SpareRows.NONE
    hook.remove()
    for name, other in (("model.norm", nn.RMSNorm(64)), ("lm_head", nn.Linear(64, 199))):
        original = model.get_submodule(name)
        model.set_submodule(name, other)
        assert spare_rows_of(model) is SpareRows.NONE
        model.set_submodule(name, original)
    assert spare_rows_of(model) is SpareRows.EMPTY
    model = patched("lfm2_moe")
    assert keeps_row_bits(model, 16)
    assert not keeps_row_bits(model, 17)
    monkeypatch.setattr(type(model.model.layers[1].feed_forward.gate), "on_kernel", False)
    assert not keeps_row_bits(model, 16)


@pytest.mark.usefixtures("like_a_gpu")
def test_it_is_found_out_anew_where_weights_were_moved() -> None:
    model = with_graphs(patch_model(FAMILIES["llama"](torch.bfloat16), kv_cache="int8", **QUICK))
    graphs = model._fastpath.graphs
    graphs.spare = SpareRows.NONE
    assert graphs.why_not(model) == ""
    assert graphs.spare is SpareRows.NONE
    model.model.norm.weight.data = model.model.norm.weight.data.clone()
    assert graphs.why_not(model) == ""
    assert graphs.spare is SpareRows.EMPTY
