"""The standard generate() on patched models: identical to stock where lossless, every feature working where not."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from tiny_models import make_llama
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from hf_fastpath import Int8KVCache, StaticKVCache, patch_model, register

LOSSLESS = {"weights": None, "kv_cache": "static"}
INT8_KV = {"weights": None, "kv_cache": "int8"}
DEFAULT = {"progress": False}
PATCHES = {"lossless": LOSSLESS, "int8 kv": INT8_KV, "default": DEFAULT}

MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95},
    "beams": {"num_beams": 3, "do_sample": False},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams, several": {"num_beams": 4, "num_return_sequences": 2, "do_sample": False},
    "repetition": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 4},
    "eos": {"do_sample": False, "eos_token_id": list(range(2, 40))},
}


def generate(model: Any, inputs: dict[str, torch.Tensor], **kwargs: Any) -> Any:
    torch.manual_seed(7)
    return model.generate(**inputs, max_new_tokens=12, **kwargs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("seed", [0, 1])
def test_lossless_mode_is_identical_to_stock(mode: str, padding: bool, seed: int, prompt: Any, padded: Any) -> None:
    inputs = padded if padding else {"input_ids": prompt}
    expected = generate(make_llama(seed=seed), inputs, **MODES[mode])
    got = generate(patch_model(make_llama(seed=seed), **LOSSLESS), inputs, **MODES[mode])
    assert torch.equal(got, expected)


@pytest.mark.parametrize("mode", ["greedy", "sampling", "beams"])
def test_lossless_scores_logits_and_dict_are_identical(mode: str, padded: Any) -> None:
    flags = {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "output_hidden_states": True,
    }
    expected = generate(make_llama(), padded, **MODES[mode], **flags)
    got = generate(patch_model(make_llama(), **LOSSLESS), padded, **MODES[mode], **flags)
    assert torch.equal(got.sequences, expected.sequences)
    for kind in ("scores", "logits"):
        assert len(got[kind]) == len(expected[kind]) == 12
        assert all(torch.equal(a, b) for a, b in zip(got[kind], expected[kind], strict=True))
    for a, b in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert isinstance(got.past_key_values, StaticKVCache)


class Recorder(BaseStreamer):
    """Keeps what a streamer is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("patch", PATCHES)
def test_streamers_get_every_token_in_order(patch: str, prompt: torch.Tensor) -> None:
    streamer = Recorder()
    model = patch_model(make_llama(), **PATCHES[patch])
    out = generate(model, {"input_ids": prompt[:1]}, do_sample=False, streamer=streamer)
    assert streamer.ended
    assert streamer.tokens == out[0].tolist()


class Forbid(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, 50:] = float("-inf")
        return scores


class StopAfter(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 12, device=input_ids.device)


@pytest.mark.parametrize("patch", PATCHES)
def test_users_own_processors_and_criteria(patch: str, prompt: torch.Tensor) -> None:
    extra = {"logits_processor": [Forbid()], "stopping_criteria": [StopAfter()], "do_sample": False}
    out = generate(patch_model(make_llama(), **PATCHES[patch]), {"input_ids": prompt}, **extra)
    assert out.shape == (2, 12)
    assert int(out[:, 7:].max()) < 50
    if patch == "lossless":
        assert torch.equal(out, generate(make_llama(), {"input_ids": prompt}, **extra))


@pytest.mark.parametrize("patch", ["int8 kv", "default"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_runs_on_int8(patch: str, mode: str, padded: Any) -> None:
    model = patch_model(make_llama(), **PATCHES[patch])
    first, second = (generate(model, padded, **MODES[mode]) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape[0] == 3 * MODES[mode].get("num_return_sequences", 1)
    assert 9 <= first.shape[1] <= 20


@pytest.mark.parametrize("patch", PATCHES)
def test_padded_rows_give_what_they_give_alone(patch: str, padded: Any) -> None:
    model = patch_model(make_llama(), **PATCHES[patch])
    together = generate(model, padded, do_sample=False, return_dict_in_generate=True, output_logits=True)
    for row in range(3):
        length = int(padded["attention_mask"][row].sum())
        alone = generate(
            model,
            {"input_ids": padded["input_ids"][row : row + 1, -length:]},
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        assert torch.equal(together.sequences[row, 8:], alone.sequences[0, length:])
        for a, b in zip(together.logits, alone.logits, strict=True):
            # Sums in another order in float32; with int4 weights each activation is also rounded to bf16 again.
            tolerance = 1e-4 if patch != "default" else 0.03
            assert float((a[row] - b[0]).abs().max()) <= tolerance * float(b.abs().max())


@pytest.mark.parametrize("patch", PATCHES)
def test_a_padded_batch_of_one_is_masked(patch: str, padded: Any) -> None:
    model = patch_model(make_llama(), **PATCHES[patch])
    one = {name: value[1:2] for name, value in padded.items()}
    got = generate(model, one, do_sample=False)
    expected = generate(model, {"input_ids": one["input_ids"][:, 3:]}, do_sample=False)
    assert torch.equal(got[:, 8:], expected[:, 5:])


@pytest.mark.parametrize("patch", ["lossless", "int8 kv"])
@pytest.mark.parametrize("helper", ["prompt lookup", "assistant"])
def test_assisted_decoding_gives_the_greedy_tokens(patch: str, helper: str, prompt: torch.Tensor) -> None:
    model = patch_model(make_llama(), **PATCHES[patch])
    inputs = {"input_ids": prompt[:1].repeat(1, 3)}
    expected = generate(model, inputs, do_sample=False)
    assistant = patch_model(make_llama(seed=5, num_hidden_layers=1), **PATCHES[patch])
    extra = {"prompt_lookup_num_tokens": 3} if helper == "prompt lookup" else {"assistant_model": assistant}
    assert torch.equal(generate(model, inputs, do_sample=False, **extra), expected)


@pytest.mark.parametrize("patch", PATCHES)
def test_continuing_with_a_returned_cache(patch: str, prompt: torch.Tensor) -> None:
    model = patch_model(make_llama(), **PATCHES[patch])
    whole = generate(model, {"input_ids": prompt}, do_sample=False)
    first = model.generate(prompt, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    rest = model.generate(first.sequences, max_new_tokens=7, do_sample=False, past_key_values=first.past_key_values)
    assert torch.equal(rest, whole)


def test_default_caches_and_names(prompt: torch.Tensor) -> None:
    def cache_of(model: Any, **kwargs: Any) -> str:
        out = model.generate(prompt, max_new_tokens=2, return_dict_in_generate=True, do_sample=False, **kwargs)
        return type(out.past_key_values).__name__

    model = patch_model(make_llama(), **DEFAULT)
    assert cache_of(model) == "Int8KVCache"
    assert cache_of(model, cache_implementation="fastpath_static") == "StaticKVCache"
    assert cache_of(model, cache_implementation="dynamic") == "DynamicCache"
    assert cache_of(model, cache_implementation="static") == "StaticCache"
    assert cache_of(model, generation_config=GenerationConfig(cache_implementation="fastpath_int8")) == "Int8KVCache"
    assert cache_of(model, past_key_values=StaticKVCache(model.config)) == "StaticKVCache"
    assert cache_of(patch_model(make_llama(), kv_cache="static", weights=None)) == "StaticKVCache"
    with pytest.raises(ValueError, match=r"fastpath_int3.*fastpath_static"):
        cache_of(model, cache_implementation="fastpath_int3")
    with pytest.raises(ValueError, match="Passing both"):
        cache_of(model, cache_implementation="fastpath_int8", past_key_values=Int8KVCache(model.config))
    assert model.generation_config.cache_implementation is None


def test_names_work_on_an_unpatched_model(prompt: torch.Tensor) -> None:
    register()
    register()
    model = make_llama()
    expected = model.generate(prompt, max_new_tokens=8, do_sample=False)
    out = model.generate(
        prompt, max_new_tokens=8, do_sample=False, cache_implementation="fastpath_static", return_dict_in_generate=True
    )
    assert isinstance(out.past_key_values, StaticKVCache)
    assert torch.equal(out.sequences, expected)
    out = model.generate(
        prompt, max_new_tokens=8, do_sample=False, cache_implementation="fastpath_int8", return_dict_in_generate=True
    )
    assert isinstance(out.past_key_values, Int8KVCache)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", ["greedy", "sampling", "beams", "chunked prefill"])
def test_caches_alone_on_an_unpatched_model(attention: str, mode: str, padded: Any) -> None:
    model = make_llama(attn_implementation=attention)
    expected = generate(model, padded, **MODES[mode])
    static = generate(model, padded, past_key_values=StaticKVCache(model.config), **MODES[mode])
    assert torch.equal(static, expected)
    alone = generate(model, padded, past_key_values=Int8KVCache(model.config), **MODES[mode])
    patched = generate(patch_model(make_llama(), **INT8_KV), padded, **MODES[mode])
    assert torch.equal(alone, patched)


def test_a_long_generation_grows_the_cache(prompt: torch.Tensor) -> None:
    model = patch_model(make_llama(), **LOSSLESS)
    cache = StaticKVCache(model.config)
    got = model.generate(prompt, max_new_tokens=300, do_sample=False, past_key_values=cache)
    assert cache.layers[0].capacity == 512
    assert torch.equal(got, make_llama().generate(prompt, max_new_tokens=300, do_sample=False))


def test_threads_one_after_the_other(prompt: torch.Tensor) -> None:
    model = patch_model(make_llama(), **DEFAULT)
    expected = model.generate(prompt, max_new_tokens=6, do_sample=False)
    results: list[torch.Tensor] = []
    for _ in range(2):
        thread = threading.Thread(
            target=lambda: results.append(model.generate(prompt, max_new_tokens=6, do_sample=False))
        )
        thread.start()
        thread.join()
    assert all(torch.equal(result, expected) for result in results)
    assert len(results) == 2


def test_generate_makes_room_once_and_not_without_bound(prompt: torch.Tensor) -> None:
    model = patch_model(make_llama(max_position_embeddings=100_000), **LOSSLESS)

    def capacity(new_tokens: int) -> int:
        # The criterion ends generation at once: what is looked at is the room made for what was allowed.
        out = model.generate(
            prompt,
            max_new_tokens=new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            stopping_criteria=[lambda ids, scores, **_: torch.ones(2, dtype=torch.bool)],
        )
        return out.past_key_values.layers[0].capacity

    assert capacity(1000) == 1024
    assert capacity(50_000) == 8192


@pytest.mark.parametrize("patch", PATCHES)
def test_generate_without_a_cache(patch: str, prompt: torch.Tensor) -> None:
    model = patch_model(make_llama(), **PATCHES[patch])
    out = model.generate(prompt, max_new_tokens=3, do_sample=False, use_cache=False, return_dict_in_generate=True)
    assert out.get("past_key_values") is None


@pytest.mark.parametrize("patch", PATCHES)
def test_a_conversation_that_began_in_inference_mode(patch: str, prompt: torch.Tensor) -> None:
    model = patch_model(make_llama(), **PATCHES[patch])
    whole = model.generate(prompt, max_new_tokens=9, do_sample=False)
    with torch.inference_mode():
        first = model.generate(prompt, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    rest = model.generate(first.sequences, max_new_tokens=5, do_sample=False, past_key_values=first.past_key_values)
    assert torch.equal(rest, whole)
