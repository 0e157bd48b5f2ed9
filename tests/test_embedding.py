"""The embeddings of a few tokens: where our op looks them up, and that nothing else about it changes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, logits, long_batch, make_llama
from torch import nn

from hf_fastpath import heuristics, patch_model, unpatch_model
from hf_fastpath.modules import DecodeEmbedding, decode_embedding

QUICK = {"progress": False, "scale_search": "absmax"}
IDS = torch.randint(0, 199, (2, 9), generator=torch.Generator().manual_seed(1))
Calls = list[tuple[Any, ...]]


@pytest.fixture
def lookups(monkeypatch: pytest.MonkeyPatch, count_calls: Callable[[Any, str], Calls]) -> Calls:
    """The CPU goes the way that a GPU goes."""
    monkeypatch.setattr(heuristics, "embedding_rows_supports", lambda device, dtype, rows, columns: 1 <= rows <= 16)
    return count_calls(decode_embedding, "embedding_rows")


def test_where_it_is_our_op() -> None:
    supports = heuristics.embedding_rows_supports
    assert supports("cuda", torch.float16, 1, 8)
    assert supports("cuda", torch.bfloat16, 16, 4096)
    assert not any(supports("cuda", torch.float16, rows, 64) for rows in (0, 17))
    assert not supports("cuda", torch.float16, 4, 100)
    assert not supports("cuda", torch.float32, 4, 64)
    assert not supports("cpu", torch.float16, 4, 64)


def test_the_same_rows(lookups: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = nn.Embedding(50, 24, padding_idx=3).bfloat16()
    fast = copy.deepcopy(plain)
    fast.__class__ = DecodeEmbedding

    def both(ids: torch.Tensor) -> None:
        out = fast(ids)
        assert out.is_contiguous()
        assert torch.equal(out, plain(ids))

    def ids(*shape: int) -> torch.Tensor:
        return torch.randint(0, 50, shape)

    both(ids(4, 1))  # gradients
    with torch.no_grad():
        for shape in ((17, 1), (0, 1)):
            both(ids(*shape))
        both(ids(4, 1).int())
        with monkeypatch.context() as compiling:
            compiling.setattr(torch.compiler, "is_compiling", lambda: True)
            both(ids(4, 1))
        assert not lookups
        for count, shape in enumerate(((1, 1), (), (2, 1), (16, 1), (1, 16), (5,), (2, 2, 3)), 1):
            both(ids(*shape))
            assert len(lookups) == count
        for strided in (ids(3, 4).T, ids(4, 3)[:, -1:]):
            both(strided)
            assert lookups[-1][0].is_contiguous()
        both(torch.full((2, 1), 3))  # padding
        with pytest.raises(IndexError):
            fast(torch.tensor([[-1], [2]]))
        with pytest.raises(IndexError):
            fast(torch.tensor([[50], [2]]))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "lfm2", "lfm2_moe", "gpt2"])
def test_steps_gather(family: str, lookups: Calls) -> None:
    model = patch_model(FAMILIES[family](), **QUICK)
    assert isinstance(model.get_input_embeddings(), DecodeEmbedding)
    inputs, options = long_batch((0, 5)), {"do_sample": False, "max_new_tokens": 6}
    out = model.generate(**inputs, **options)
    each = 2 if family == "gpt2" else 1
    assert sum(call[1] is model.get_input_embeddings().weight for call in lookups) == 5
    for module in model.modules():
        if isinstance(module, DecodeEmbedding):
            module.__class__ = nn.Embedding
            each -= 1
    assert each == 0
    assert torch.equal(out, model.generate(**inputs, **options))


@pytest.mark.parametrize("tied", [False, True])
def test_it_stays_an_embedding(tied: bool, tmp_path: Path) -> None:
    model = make_llama(torch.bfloat16, tie_word_embeddings=tied)
    original = model.model.embed_tokens
    patch_model(model, **QUICK, keep_original=True)
    assert model.get_input_embeddings() is original
    assert isinstance(original, DecodeEmbedding)
    model.tie_weights()
    assert (original.weight is model.lm_head.weight) == tied
    before = logits(model, IDS)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other.model.embed_tokens, DecodeEmbedding)
        assert torch.equal(logits(other, IDS), before)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert isinstance(loaded.model.embed_tokens, DecodeEmbedding)
    unpatch_model(model)
    assert model.get_input_embeddings() is original
    assert type(original) is nn.Embedding
    assert type(patch_model(make_llama(), weights=None).model.embed_tokens) is nn.Embedding
