"""The angles of rotary embeddings: the reference against transformers, and where the op runs."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import generator
from rotary_cases import DTYPES, ROPES, SHAPES, check_angles, frequencies, positions_of, rotary_embedding
from tiny_models import FAMILIES, logits, long_batch, make_llama
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hf_fastpath import fastpath_report, heuristics, ops, patch_model, unpatch_model
from hf_fastpath.modules import RotaryAngles, rotary
from hf_fastpath.modules.rotary import FIXED_FREQUENCIES

QUICK = {"progress": False, "scale_search": "absmax"}
IDS = torch.randint(0, 199, (2, 9), generator=torch.Generator().manual_seed(1))
ROTARY_FAMILIES = {"llama": "rotary_emb", "mistral": "rotary_emb", "qwen2": "rotary_emb", "qwen3": "rotary_emb",
                   "lfm2": "rotary_emb", "lfm2_moe": "pos_emb"}  # fmt: skip
Calls = list[tuple[Any, ...]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, count_calls: Callable[[Any, str], Calls]) -> Calls:
    """The CPU goes the way that a GPU goes, on the reference."""
    monkeypatch.setattr(heuristics, "rope_angles_supports", lambda device, dtype: True)
    return count_calls(rotary, "rope_angles")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    positions, inv_freq = positions_of(generator(*shape), *shape[:2]), frequencies(shape[2])
    found = ops.rope_angles(positions, inv_freq, 1.25, torch.empty(0, dtype=dtype))
    check_angles(positions, inv_freq, 1.25, found, dtype)
    if positions.numel() > 1:  # a position counts, and so does which half is the cosine
        with pytest.raises(AssertionError, match="beyond their bound"):
            check_angles(positions + 1, inv_freq, 1.25, found, dtype)
        with pytest.raises(AssertionError, match="beyond their bound"):
            check_angles(positions, inv_freq, 1.25, (found[1], found[0]), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rope_type", ROPES)
def test_the_bits_are_transformers(rope_type: str, dtype: torch.dtype, calls: Calls) -> None:
    stock = rotary_embedding(rope_type, **ROPES[rope_type])
    fast = copy.deepcopy(stock)
    fast.__class__ = type("Fast", (RotaryAngles, LlamaRotaryEmbedding), {})
    assert fast.why_not(stock) == ""
    assert (stock.attention_scaling != 1) == (rope_type == "yarn")
    for rows, tokens in ((1, 1), (3, 1), (2, 7)):
        positions = positions_of(generator(rows, tokens), rows, tokens)
        x = torch.empty(rows, tokens, 64, dtype=dtype)
        with torch.inference_mode():
            found = fast(x, position_ids=positions)
        for got, want in zip(found, stock(x, positions), strict=True):
            assert got.dtype is want.dtype is dtype
            assert torch.equal(got, want)
    assert len(calls) == 3


def test_frequencies_that_change_stay_transformers(calls: Calls) -> None:
    for rope_type, parameters in (
        ("dynamic", {"factor": 4.0}),
        ("longrope", {"factor": 4.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
                      "original_max_position_embeddings": 64}),
    ):  # fmt: skip
        assert rope_type not in FIXED_FREQUENCIES
        assert rope_type in RotaryAngles.why_not(rotary_embedding(rope_type, **parameters))
        model = make_llama(rope_parameters={"rope_type": rope_type, "rope_theta": 1e4, **parameters})
        kind = type(model.model.rotary_emb)
        patch_model(model, **QUICK)
        assert type(model.model.rotary_emb) is kind
        own = "Forward passes of transformers' own: 1 LlamaRotaryEmbedding, whose frequencies"
        assert f"{own} ({rope_type})" in str(fastpath_report(model))
        logits(model, IDS)
    assert not calls


@pytest.mark.parametrize("family", ROTARY_FAMILIES)
def test_models_call_it_once_a_step(family: str, calls: Calls) -> None:
    """With the bits of transformers' own, by the names that both versions have."""
    model, inputs = patch_model(FAMILIES[family](), **QUICK), long_batch((0, 5))
    embedding = model.model.get_submodule(ROTARY_FAMILIES[family])
    assert isinstance(embedding, RotaryAngles)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "output_logits": True}
    out = model.generate(**inputs, **options, return_dict_in_generate=True)
    assert [tuple(call[0].shape) for call in calls] == [(2, inputs["input_ids"].shape[1]), *[(2, 1)] * 5]
    embedding.__class__ = type(embedding).__mro__[2]
    expected = model.generate(**inputs, **options, return_dict_in_generate=True)
    assert len(calls) == 6
    assert torch.equal(out.sequences, expected.sequences)
    for got, want in zip(out.logits, expected.logits, strict=True):
        assert torch.equal(got, want)


def test_what_is_not_for_the_op(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = rotary_embedding()
    fast = copy.deepcopy(stock)
    fast.__class__ = type("Fast", (RotaryAngles, LlamaRotaryEmbedding), {})
    x, positions = torch.empty(2, 3, 64), positions_of(generator(1), 2, 3)

    def both(x: torch.Tensor, positions: torch.Tensor) -> None:
        for got, want in zip(fast(x, positions), stock(x, positions), strict=True):
            assert torch.equal(got, want)

    both(x, positions)  # gradients
    with torch.no_grad():
        both(x, positions.int())
        with monkeypatch.context() as compiling:
            compiling.setattr(torch.compiler, "is_compiling", lambda: True)
            both(x, positions)
        for module in (stock, fast):
            module.to(torch.bfloat16)
        both(x, positions)
        assert not calls
        for module in (stock, fast):
            module.to(torch.float32)
        both(x, positions.T.contiguous().T)
        assert len(calls) == 1
        with torch.autocast("cpu", torch.bfloat16):
            both(x, positions)


def test_when_it_is_swapped() -> None:
    """Only beside packed layers; a subclass, whose forward may be another one, is left; a patch can be undone."""

    class Other(LlamaRotaryEmbedding):
        pass

    assert heuristics.rope_angles_supports("cuda", torch.float32)
    assert not heuristics.rope_angles_supports("cpu", torch.bfloat16)
    assert not heuristics.rope_angles_supports("cuda", torch.float64)
    model = make_llama()
    patch_model(model, **QUICK, keep_original=True)
    assert isinstance(model.model.rotary_emb, RotaryAngles)
    assert "LlamaRotaryEmbedding" in str(fastpath_report(model))
    before = logits(model, IDS)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other.model.rotary_emb, RotaryAngles)
        assert torch.equal(logits(other, IDS), before)
    unpatch_model(model)
    assert type(model.model.rotary_emb) is LlamaRotaryEmbedding
    full_precision = patch_model(make_llama(), weights=None)
    assert type(full_precision.model.rotary_emb) is LlamaRotaryEmbedding
    model = make_llama()
    model.model.rotary_emb.__class__ = Other
    assert type(patch_model(model, **QUICK).model.rotary_emb) is Other
