"""Chunks in which every token sees what it sees in decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import make_lfm2, make_llama
from transformers import DynamicCache

from hf_fastpath import FastpathConfig, Fp8KVCache, Int4KIVICache, Int8KVCache, patch_model
from hf_fastpath.eval.chunks import chunk_sizes, logits_in_chunks
from hf_fastpath.eval.compare import empty_cache

FORMATS = (None, "static", "int8", "fp8", "int4", "h2o")


def test_a_token_that_fills_a_group_is_alone() -> None:
    config = make_llama().config
    assert chunk_sizes(Int4KIVICache(config), 200) == [64, 3, 1, 63, 1, 63, 1, 4]
    assert chunk_sizes(Fp8KVCache(config), 130, 100) == [63, 1, 63, 1, 2]
    for cache in (Int8KVCache(config), DynamicCache(config=config)):
        assert chunk_sizes(cache, 130) == [64, 64, 2]
        assert chunk_sizes(cache, 3, 1) == [1, 1, 1]


def test_a_chunk_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="kv_chunk=0: must be 1"):
        chunk_sizes(Int8KVCache(make_llama().config), 5, 0)


def patched(make: Any, kv_cache: str | None) -> tuple[Any, FastpathConfig]:
    config = FastpathConfig(weights=None, kv_cache=kv_cache, kv_budget=48, progress=False)  # type: ignore[arg-type]
    return patch_model(make(), config), config


@pytest.mark.parametrize("make", [make_llama, make_lfm2], ids=["llama", "lfm2"])
@pytest.mark.parametrize("kv_cache", FORMATS)
def test_right_padding_changes_nothing_before_it(kv_cache: str | None, make: Any) -> None:
    """Bit for bit: the shapes are the same, so any difference would be the padding's."""
    model, config = patched(make, kv_cache)
    generator = torch.Generator().manual_seed(5)
    ids, padding = (torch.randint(2, 199, (2, 150), generator=generator) for _ in range(2))
    own = torch.tensor([150, 61])  # the second row's padding fills the groups that its own tokens are in
    padded = torch.where(torch.arange(150) < own[:, None], ids, padding)
    with torch.inference_mode():
        logits = [torch.cat(list(logits_in_chunks(model, x, empty_cache(model, config))), 1) for x in (ids, padded)]
    for row, tokens in enumerate(own):
        assert torch.equal(logits[0][row, :tokens], logits[1][row, :tokens])
    assert not torch.equal(logits[0][1, 61:], logits[1][1, 61:])


@pytest.mark.parametrize("kv_cache", FORMATS)
def test_chunks_of_any_size_are_decoding(kv_cache: str | None) -> None:
    model, config = patched(make_llama, kv_cache)
    ids = torch.randint(2, 199, (2, 100), generator=torch.Generator().manual_seed(6))
    with torch.inference_mode():
        plain = model(ids, use_cache=False).logits.log_softmax(-1)
        chunked = {
            size: torch.cat(list(logits_in_chunks(model, ids, empty_cache(model, config), size)), 1).log_softmax(-1)
            for size in (1, 33, 1000)
        }
        cache, decoded = empty_cache(model, config), []
        for token in ids.split(1, dim=1):
            decoded.append(model(input_ids=token, past_key_values=cache).logits.log_softmax(-1))
    assert torch.equal(chunked[1], torch.cat(decoded, 1))
    exact = kv_cache in (None, "static")
    for size in (33, 1000):
        error = (chunked[size] - chunked[1]).abs()
        if exact:
            assert float(error.max()) < 1e-3  # the last bits of float32 logits of magnitude below 2^7
        # Where the last bits differ, a value is now and then rounded to the next step, which moves the tokens behind.
        assert float(error.median()) < 1e-3
    assert (float((chunked[33] - plain).abs().max()) < 1e-3) == exact
