"""The decode step of generate() as a CUDA graph: the tokens of transformers' own loop without graphs, whatever is asked
for."""

from __future__ import annotations

import copy
import functools
import gc
import threading
import time
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, long_batch, make_llama

from hf_fastpath import patch_model, unpatch_model
from hf_fastpath.caches.conv_state import ConvStateLayer
from hf_fastpath.capture import CudaCapture, _capture_stream
from hf_fastpath.slot import Slot
from hf_fastpath.spare_rows import SpareRows

pytestmark = pytest.mark.gpu

SIZES = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 384,
}
GREEDY = {"do_sample": False, "max_new_tokens": 90}
SAMPLE = {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 1.3, "max_new_tokens": 40}


@functools.cache
def patched(kv_cache: str, family: str = "") -> Any:
    return new_patched(kv_cache, family)


def new_patched(kv_cache: str, family: str = "", **options: Any) -> Any:
    model = (FAMILIES[family](torch.bfloat16) if family else make_llama(torch.bfloat16, **SIZES)).to("cuda")
    if kv_cache == "h2o":
        options |= {"kv_budget": 48}
    return patch_model(model, kv_cache=kv_cache, scale_search="absmax", progress=False, **options)


def on_gpu(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to("cuda") for name, tensor in inputs.items()}


def captured(model: Any) -> int:
    """How many graphs there are."""
    return sum(len(slot.captured) for slot in model._fastpath.graphs.slots)


def check_alike(model: Any, **inputs: Any) -> Any:
    """The same tokens, scores and random numbers afterwards; nothing is captured for the comparison."""
    before = captured(model)
    torch.manual_seed(1)
    want = model.generate(**inputs, disable_compile=True)
    assert captured(model) == before
    after = torch.cuda.get_rng_state()
    for _ in range(2):  # the second time from the first token on by graphs
        torch.manual_seed(1)
        got = model.generate(**inputs)
        assert torch.equal(torch.cuda.get_rng_state(), after)
        if isinstance(got, torch.Tensor):
            assert torch.equal(got, want)
            continue
        assert torch.equal(got.sequences, want.sequences)
        for name in ("scores", "logits"):
            for mine, theirs in zip(got.get(name) or (), want.get(name) or (), strict=True):
                assert torch.equal(mine, theirs)
        for mine, theirs in zip(got.past_key_values.layers, want.past_key_values.layers, strict=True):
            assert isinstance(mine, ConvStateLayer) or torch.equal(mine.keys, theirs.keys)
    assert captured(model)
    return got


@pytest.mark.parametrize("kv_cache", ["int8", "fp8", "int4", "h2o", "static"])
@pytest.mark.parametrize(
    "padding", [(0,), (5,), (0, 0, 0), (0, 7, 30), tuple(range(16)), (0,) * 20, tuple(range(64))], ids=str
)
def test_the_tokens_of_the_uncaptured_step(kv_cache: str, padding: tuple[int, ...]) -> None:
    for how in (GREEDY, SAMPLE):
        check_alike(patched(kv_cache), **on_gpu(long_batch(padding)), **how)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral", "lfm2", "lfm2_moe", "gpt2"])
@pytest.mark.parametrize("padding", [(0,), (0, 7, 30)], ids=str)
def test_other_families(family: str, padding: tuple[int, ...]) -> None:
    for how in (GREEDY, {**SAMPLE, "eos_token_id": 5}, {**GREEDY, "eos_token_id": 5, "return_dict_in_generate": True}):
        check_alike(patched("int8", family), **on_gpu(long_batch(padding)), **how)


@pytest.mark.parametrize("padding", [(5,), (0, 7, 30)], ids=str)
@pytest.mark.parametrize("family", ["llama", "lfm2_moe"])
def test_weights_as_they_are(family: str, padding: tuple[int, ...]) -> None:
    model = patch_model(FAMILIES[family](torch.bfloat16).cuda(), weights=None, kv_cache="int8", progress=False)
    check_alike(model, **on_gpu(long_batch(padding)), **GREEDY)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "lfm2", "lfm2_moe", "gpt2"])
@pytest.mark.parametrize("kv_cache", ["static", "int8"])
@pytest.mark.parametrize("padding", [(0,), (0, 7, 30), tuple(range(33))], ids=len)
def test_weights_as_they_are_in_steps(family: str, kv_cache: str, padding: tuple[int, ...]) -> None:
    model = FAMILIES[family](torch.bfloat16).cuda()
    patch_model(model, weights="w16a16", kv_cache=kv_cache, progress=False)
    for how in (GREEDY, SAMPLE):
        check_alike(model, **on_gpu(long_batch(padding)), **how)


@pytest.mark.parametrize("batch", [1, 16, 40])
@pytest.mark.parametrize("weights", ["w4a16", "w16a16"])
def test_steps_that_overlap_give_the_same_numbers(batch: int, weights: str) -> None:
    """A model large enough that kernels run into each other, time and again."""
    sizes = SIZES | {"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128}
    sizes |= {"intermediate_size": 5632, "num_hidden_layers": 8, "initializer_range": 0.03}
    model = make_llama(torch.bfloat16, **sizes).cuda()
    patch_model(model, weights=weights, scale_search="absmax", progress=False)
    inputs = on_gpu(long_batch((0,) * batch))
    flags = {"do_sample": False, "max_new_tokens": 60, "return_dict_in_generate": True, "output_logits": True}
    want = model.generate(**inputs, **flags, disable_compile=True)
    for _ in range(5):
        got = model.generate(**inputs, **flags)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(got.logits, want.logits, strict=True))
        assert torch.equal(got.sequences, want.sequences)


HOW = {
    "processors that need the tokens": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "scores": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    "sampled scores": {**SAMPLE, "return_dict_in_generate": True, "output_scores": True},
    "num_return_sequences": {**SAMPLE, "num_return_sequences": 3},
    "plain sampling": {"do_sample": True, "top_k": 0},
    "min_p": {"do_sample": True, "top_k": 0, "min_p": 0.05},
    "prefill in chunks": {"prefill_chunk_size": 17},
}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize("padding", [(0,), (0, 7)], ids=str)
def test_modes(how: dict[str, Any], padding: tuple[int, ...]) -> None:
    check_alike(patched("int4"), **on_gpu(long_batch(padding)), **(GREEDY | how))


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_modes_without_graphs(how: dict[str, Any]) -> None:
    model, inputs = patched("int8"), on_gpu(long_batch((0,)))
    want = model.generate(**inputs, **GREEDY, **how, disable_compile=True)
    assert torch.equal(model.generate(**inputs, **GREEDY, **how), want)


@pytest.mark.parametrize("how", [GREEDY, SAMPLE, {**SAMPLE, "repetition_penalty": 1.2}], ids=str)
@pytest.mark.parametrize("returned", [False, True])
@pytest.mark.parametrize("padding", [(4,), (0, 4)], ids=str)
@pytest.mark.parametrize("family", ["", "lfm2_moe"])
def test_end_tokens(family: str, padding: tuple[int, ...], how: dict[str, Any], returned: bool) -> None:
    """Stopping is seen a token late, and leaves nothing behind."""
    model, inputs = patched("int4", family), on_gpu(long_batch(padding))
    torch.manual_seed(1)
    tokens = model.generate(**inputs, **how)
    ends = [int(row[90 + 5 * i]) for i, row in enumerate(tokens)]
    check_alike(model, **inputs, **how, eos_token_id=ends, return_dict_in_generate=returned)


def test_one_row_that_draws_nothing_has_one_graph_a_token() -> None:
    """For each set of end tokens and with padding; what draws or needs more than logits keeps its own."""
    model = new_patched("int8")
    for padding, how in (((0,), GREEDY), ((5,), GREEDY), ((0,), {**GREEDY, "eos_token_id": 5}), ((0,), SAMPLE)):
        for new in (1, 2, 3, 40):
            check_alike(model, **on_gpu(long_batch(padding)), **(how | {"max_new_tokens": new}))
            gc.collect()
    (slot,) = model._fastpath.graphs.slots
    assert sorted(name for name, _ in slot.captured) == ["choice"] * 3 + ["step"] + ["token"] * 3


def test_lengths_of_a_batch_share_one_capture() -> None:
    model = new_patched("int8")
    for tokens in (70, 33, 400):
        check_alike(model, **on_gpu(long_batch((0,) * 4, tokens)), **GREEDY)
        gc.collect()
    assert captured(model) == 2  # the step, and how a token is chosen


def steps_captured(model: Any, kind: str = "step") -> int:
    return sum(name == kind for slot in model._fastpath.graphs.slots for name, _ in slot.captured)


def tokens_and_logits(model: Any, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Without the cache, so that its slot is free again."""
    out = model.generate(**inputs, return_dict_in_generate=True, output_logits=True)
    result = out.sequences, torch.stack(out.logits)
    del out
    gc.collect()
    return result


# Of each, what rows that no batch has are, and how many step graphs four batches of a slot have then.
SHARING = {
    "llama": ({}, SpareRows.EMPTY, 1),
    "qwen2": ({}, SpareRows.EMPTY, 1),
    "qwen3, fp8 cache": ({"kv_cache": "fp8"}, SpareRows.EMPTY, 1),
    "mistral, int4 cache": ({"kv_cache": "int4"}, SpareRows.EMPTY, 1),
    "llama, static cache": ({"kv_cache": "static"}, SpareRows.EMPTY, 1),
    "lfm2": ({}, SpareRows.EMPTY, 1),
    "lfm2_moe": ({}, SpareRows.REPEATED, 1),
    "lfm2_moe, int4 cache": ({"kv_cache": "int4"}, SpareRows.REPEATED, 1),
    "llama, w16a16": ({"weights": "w16a16"}, SpareRows.EMPTY, 1),
    "lfm2_moe, w16a16": ({"weights": "w16a16"}, SpareRows.REPEATED, 1),
    "llama, int8 head": ({"lm_head": "int8"}, SpareRows.EMPTY, 1),
    "gpt2": ({}, SpareRows.NONE, 4),
    "llama, weights=None": ({"weights": None}, SpareRows.NONE, 4),
}


@pytest.mark.parametrize("kind", SHARING)
@pytest.mark.parametrize("batches", [(5, 6, 7, 8), (11, 9, 16, 12)], ids=str)
def test_batches_share_a_step_where_all_products_are_ours(kind: str, batches: tuple[int, ...]) -> None:
    """With the logits of the step without a graph, bit for bit."""
    if torch.cuda.get_device_capability() not in ((8, 0), (9, 0)):
        pytest.skip("cuBLAS runs the head of other GPUs")
    options, spare, steps = SHARING[kind]
    model = new_patched(**({"kv_cache": "int8", "family": kind.split(",")[0]} | options))
    assert model._fastpath.graphs.spare is spare
    for batch in batches:
        inputs = on_gpu(long_batch((0,) * batch, 40 + batch))
        want = tokens_and_logits(model, **inputs, **GREEDY, disable_compile=True)
        for _ in range(2):
            got = tokens_and_logits(model, **inputs, **GREEDY)
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, want, strict=True))
        check_alike(model, **inputs, **SAMPLE)
        check_alike(model, **inputs, **GREEDY)
        gc.collect()
    assert steps_captured(model) == steps_captured(model, "token") == steps


@pytest.mark.parametrize("family", ["llama", "lfm2_moe"])
@pytest.mark.parametrize("batch", [3, 5, 11, 16, 20])
def test_rows_end_one_by_one(family: str, batch: int) -> None:
    """A row that nobody has does not keep the others from being finished, nor ends for them."""
    model, inputs = patched("int8", family), on_gpu(long_batch((0,) * batch))
    tokens = model.generate(**inputs, **GREEDY, disable_compile=True)[:, 70:]
    for place in (0, 9):
        ends = sorted({int(tokens[row, max(place - row, 0)]) for row in range(batch)})
        for end in (ends, ends[:1]):
            check_alike(model, **inputs, **GREEDY, eos_token_id=end)
            gc.collect()


def test_batches_of_an_h2o_cache_share_a_step() -> None:
    model = new_patched("h2o")
    for padding in ((0,) * 5, (0,) * 8, (0, 7, 30, 1, 0, 2), (0, 3, 1, 0, 9, 0, 0)):
        for how in (GREEDY, SAMPLE):
            check_alike(model, **on_gpu(long_batch(padding)), **how)
            gc.collect()
    assert steps_captured(model) == 2  # with padding and without


@pytest.mark.parametrize("kv_cache", ["int8", "fp8", "int4", "h2o", "static"])
@pytest.mark.parametrize("family", ["llama", "lfm2_moe"])
def test_spare_rows_never_fill_a_slot(family: str, kv_cache: str) -> None:
    """To its last token, and a returned cache time and again: kernels trap where there is no room."""
    model = new_patched(kv_cache, family)
    for batch in (16, 9, 11):
        inputs = on_gpu(long_batch((0,) * batch, 6))
        want = model.generate(**inputs, do_sample=False, max_new_tokens=251, disable_compile=True)
        got = model.generate(**inputs, do_sample=False, max_new_tokens=251)
        assert torch.equal(got, want)
        assert [slot.capacity for slot in model._fastpath.graphs.slots] == [256]
        gc.collect()
    ids, cache = on_gpu(long_batch((0,) * 9, 6))["input_ids"], None
    for _ in range(4):
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=58, do_sample=False,
            return_dict_in_generate=True,
        )  # fmt: skip
        cache, ids = out.past_key_values, torch.cat([out.sequences, out.sequences[:, -3:]], 1)
    assert ids.shape[1] == 250
    torch.cuda.synchronize()


@pytest.mark.parametrize("family", ["llama", "lfm2_moe"])
@pytest.mark.parametrize("padding", [(0, 0, 0), (0, 7, 30)], ids=str)
def test_a_returned_cache_with_spare_rows_goes_on(family: str, padding: tuple[int, ...]) -> None:
    """Time and again, with what an end token made a step too many of taken back where the cache can."""
    model, inputs = new_patched("int8", family), on_gpu(long_batch(padding))
    flags = {**SAMPLE, "return_dict_in_generate": True}
    ends = model.generate(**inputs, **GREEDY)[:, 80].unique().tolist()
    caches, ids, mask = [None, None], inputs["input_ids"], inputs["attention_mask"]
    for turn in range(4):
        out = []
        for i, how in enumerate(({}, {"disable_compile": True})):
            torch.manual_seed(turn)
            out.append(
                model.generate(ids, attention_mask=mask, past_key_values=caches[i], eos_token_id=ends, **flags, **how)
            )
        assert torch.equal(out[0].sequences, out[1].sequences), turn
        caches = [each.past_key_values for each in out]
        ids = torch.cat([out[0].sequences, out[0].sequences[:, :3].clamp(min=2)], 1)
        mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)


def test_a_returned_cache_goes_on() -> None:
    model, inputs = patched("int4"), on_gpu(long_batch((0,)))
    got = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    kept = copy.deepcopy(got.past_key_values)
    more = torch.cat([got.sequences, got.sequences[:, :3]], 1)
    continued = model.generate(more, past_key_values=got.past_key_values, **GREEDY)
    assert torch.equal(continued, model.generate(more, past_key_values=kept, **GREEDY, disable_compile=True))


@pytest.mark.parametrize("padding", [(3,), (0, 3)], ids=str)
def test_no_token_waits_for_the_gpu(padding: tuple[int, ...]) -> None:
    model, inputs = patched("int8"), on_gpu(long_batch(padding))
    for how in (GREEDY, {**GREEDY, "eos_token_id": 199}, {**SAMPLE, "eos_token_id": 199}):  # a token that never comes
        for _ in range(2):  # the first token of one row is chosen by a graph from the third call on
            model.generate(**inputs, **how)
        syncs = []
        for tokens in (10, 40):
            torch.cuda.set_sync_debug_mode("warn")
            with pytest.warns(UserWarning, match="synchronizing") as caught:
                model.generate(**inputs, **(how | {"max_new_tokens": tokens}))
            torch.cuda.set_sync_debug_mode("default")
            syncs.append(sum("synchronizing" in str(warning.message) for warning in caught))
        assert syncs[0] == syncs[1] > 0  # those around the loop


def test_threads_one_after_the_other_and_at_once() -> None:
    model, inputs = patched("int8"), [on_gpu(long_batch((0,), 50 + 20 * i)) for i in range(4)]
    want = [model.generate(**x, **GREEDY, disable_compile=True) for x in inputs]
    got: list[Any] = [None] * 4

    def work(i: int) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            got[i] = model.generate(**inputs[i], **GREEDY)
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("how", [GREEDY, SAMPLE], ids=["greedy", "sample"])
@pytest.mark.parametrize("padding", [(7,), (0, 7)], ids=str)
def test_a_capture_that_finds_no_memory(
    padding: tuple[int, ...], how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the step runs as it is, and later calls are captured: nothing that failed is left behind."""
    model, inputs = new_patched("int8"), on_gpu(long_batch(padding))
    torch.manual_seed(1)
    want = model.generate(**inputs, **how, disable_compile=True)
    take, failing = Slot.take, {"left": 4}  # two attempts each of two calls

    def take_once_there_is_memory(slot: Slot, logits: torch.Tensor) -> None:
        take(slot, logits)
        if failing["left"] and torch.cuda.is_current_stream_capturing():
            failing["left"] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory, says the test")

    monkeypatch.setattr(Slot, "take", take_once_there_is_memory)
    while failing["left"]:
        torch.manual_seed(1)
        with pytest.warns(UserWarning, match="without a CUDA graph"):
            assert torch.equal(model.generate(**inputs, **how), want)
    check_alike(model, **inputs, **how)


@pytest.mark.parametrize("fails", [False, True])
def test_a_capture_that_starts_late_spoils_no_random_numbers(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What capturing puts on a stream of its own may run as late as while the next replay does, as on a GPU that
    several processes share. That is no matter of the replay."""
    device = torch.device("cuda", torch.cuda.current_device())
    noise, capture = torch.empty(1000, device=device), CudaCapture(device)

    def draw() -> None:
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        noise.exponential_(1)

    torch.manual_seed(1)
    graph = capture(draw)
    torch.rand(8, device=device)  # so that the numbers to come are not the first ones
    before = torch.cuda.get_rng_state()
    draw()
    want, after = noise.clone(), torch.cuda.get_rng_state()
    synchronize = torch.cuda.synchronize

    def synchronize_and_delay(which: torch.device) -> None:
        synchronize(which)
        with torch.cuda.stream(_capture_stream(which)):
            torch.cuda._sleep(40_000_000)

    def fail() -> None:
        draw()
        raise KeyError("says the test")

    torch.cuda.set_rng_state(before)
    noise.zero_()
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize_and_delay)
    if fails:
        with pytest.raises(KeyError):
            capture(fail)
    else:
        graph = capture(draw)
    graph.replay()
    assert torch.equal(noise, want)
    assert torch.equal(torch.cuda.get_rng_state(), after)


def test_the_first_call_is_ready_soon() -> None:
    model, inputs = new_patched("int8"), on_gpu(long_batch((0,)))
    model.generate(**inputs, max_new_tokens=1, do_sample=False, disable_compile=True)
    start = time.perf_counter()
    model.generate(**inputs, max_new_tokens=3, do_sample=False)
    torch.cuda.synchronize()
    assert time.perf_counter() - start < 5


def test_the_memory_is_given_back() -> None:
    model, inputs = new_patched("int8", keep_original=True), on_gpu(long_batch((0,)))
    model.generate(**inputs, max_new_tokens=2, do_sample=False, disable_compile=True)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    model.generate(**inputs, **GREEDY)
    assert torch.cuda.memory_reserved() > before
    unpatch_model(model)
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + 2 * 2**20  # the original weights are back, the packed ones gone
