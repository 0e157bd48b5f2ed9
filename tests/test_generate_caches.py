"""generate() on every compressed cache, with prompts so long that tokens are quantized from the start."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import long_batch, make_llama

from hf_fastpath import fastpath_report, patch_model, register
from hf_fastpath.config import KVFormat
from hf_fastpath.generation import CACHES

FORMATS = [fmt.value for fmt in KVFormat if fmt.compressed and fmt is not KVFormat.H2O]
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 50},
    "beams": {"num_beams": 3, "do_sample": False},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 16},
}


def patched(kv_cache: str, seed: int = 0, **overrides: Any) -> Any:
    return patch_model(make_llama(seed=seed, **overrides), weights=None, kv_cache=kv_cache)


def generate(model: Any, inputs: dict[str, torch.Tensor], **kwargs: Any) -> Any:
    torch.manual_seed(7)
    return model.generate(**inputs, **{"max_new_tokens": 12} | kwargs)


@pytest.fixture(params=FORMATS)
def kv_cache(request: pytest.FixtureRequest) -> str:
    return request.param


FLAGS = {"return_dict_in_generate": True, "output_logits": True}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_patched_or_not(kv_cache: str, mode: str) -> None:
    """Our attention and the expanded cache under sdpa and eager attention: the same logits, while the same tokens."""
    register()
    # What a fully masked query of the padding gives is another thing in eager attention, and has a part in the scales.
    for attention, padding in (("sdpa", (0, 3, 60)), ("eager", (0, 0, 0))):
        inputs = long_batch(padding)
        expected = generate(patched(kv_cache), inputs, **MODES[mode], **FLAGS)
        assert expected.sequences.shape == (3 * MODES[mode].get("num_return_sequences", 1), 82)
        assert len(expected.sequences.unique()) > 20
        model = make_llama(attn_implementation=attention)
        alone = generate(model, inputs, cache_implementation=f"fastpath_{kv_cache}", **MODES[mode], **FLAGS)
        # The last bits differ, so a value may be rounded to the next of int4's 16 steps, which turns the logits by
        # about a hundredth, and may make another token the likeliest.
        assert torch.equal(alone.sequences[:, :73], expected.sequences[:, :73])
        for a, b in zip(alone.logits[:2], expected.logits[:2], strict=True):
            assert float((a - b).norm() / b.norm()) < 0.02


def test_the_cache_is_near_full_precision(kv_cache: str) -> None:
    inputs = long_batch((0, 5), tokens=150)
    options = {**FLAGS, "do_sample": False, "max_new_tokens": 2}
    got, want = (generate(model, inputs, **options) for model in (patched(kv_cache), make_llama()))
    assert type(got.past_key_values) is CACHES[KVFormat(kv_cache)]
    assert torch.equal(got.logits[0], want.logits[0])  # they see the unrounded prompt
    error = float((got.logits[1] - want.logits[1]).norm() / want.logits[1].norm())
    # Rounding moves values of a normal distribution by 0.005 (int8), 0.025 (fp8) and 0.1 (int4) of their size, and this
    # model, whose attention is sharp, moves its logits by up to eight times as much; without a cache it is 1.4.
    assert 0 < error < {"int8": 0.04, "fp8": 0.2, "int4": 0.8}[kv_cache]


def test_a_padded_batch_of_one_is_masked(kv_cache: str) -> None:
    model = patched(kv_cache)
    garbage = long_batch((40,), tokens=60)
    other = copy.deepcopy(garbage)
    other["input_ids"][:, :40] = 7
    options = {**FLAGS, "do_sample": False, "max_new_tokens": 2}
    first, second = (generate(model, inputs, **options) for inputs in (garbage, other))
    # What is padded has a part in the scales of groups, in nothing else.
    for a, b in zip(first.logits, second.logits, strict=True):
        assert float((a - b).norm() / b.norm()) < 0.1
    unmasked = generate(model, {"input_ids": other["input_ids"]}, **options)
    assert float((unmasked.logits[0] - first.logits[0]).norm() / first.logits[0].norm()) > 0.2


@pytest.mark.parametrize("helper", ["prompt lookup", "assistant"])
def test_assisted_decoding_gives_the_greedy_tokens(kv_cache: str, helper: str) -> None:
    """Among up to 24 tokens after 72 no group becomes full: a candidate that fills one sees it rounded a little early,
    and then nothing but the precision is the same."""
    model = patched(kv_cache)
    inputs = {"input_ids": long_batch((0,), tokens=24)["input_ids"].repeat(1, 3)}
    extra: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if helper == "assistant":
        extra = {"assistant_model": patched(kv_cache, seed=5, num_hidden_layers=1)}
    expected = generate(model, inputs, do_sample=False, max_new_tokens=24)
    assert torch.equal(generate(model, inputs, do_sample=False, max_new_tokens=24, **extra), expected)
    across = generate(model, inputs, do_sample=False, max_new_tokens=80, return_dict_in_generate=True, **extra)
    assert across.sequences.shape == (1, 152)
    assert across.past_key_values.get_seq_length() == 151


def test_continuing_copying_and_saving(kv_cache: str, tmp_path: Any) -> None:
    model, inputs = patched(kv_cache), long_batch((0, 2))
    whole = generate(model, inputs, do_sample=False, max_new_tokens=14)
    first = generate(model, inputs, do_sample=False, max_new_tokens=6, return_dict_in_generate=True)
    torch.save(first.past_key_values, tmp_path / "cache.pt")
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 6, dtype=torch.long)], 1)
    for cache in (copy.deepcopy(first.past_key_values), torch.load(tmp_path / "cache.pt", weights_only=False)):
        longer = {"input_ids": first.sequences, "attention_mask": mask}
        rest = generate(model, longer, do_sample=False, max_new_tokens=8, past_key_values=cache)
        assert torch.equal(rest, whole)


def test_the_report_names_the_format(kv_cache: str) -> None:
    assert f"{kv_cache} attention by its reference" in str(fastpath_report(patched(kv_cache)))
