"""The accuracy of caches: decoding as it is measured against one pass over the text, and the rows of the table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_models import make_llama

from hf_fastpath import Int4KIVICache, Int8KVCache, StaticKVCache, register
from hf_fastpath.caches.attention import ATTENTION_NAME
from hf_fastpath.eval import bench_kv_accuracy as bench
from hf_fastpath.eval.perplexity import perplexity


@pytest.fixture
def model() -> Any:
    register()
    model = make_llama()
    model.set_attn_implementation(ATTENTION_NAME)
    return model


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.randint(2, 199, (3, 80), generator=torch.Generator().manual_seed(5))


def test_full_precision_has_the_perplexity_of_one_pass(model: Any, windows: torch.Tensor) -> None:
    one_pass = perplexity(model, windows.flatten(), 80)
    decoded = bench.decode_perplexity(model, windows, StaticKVCache(model.config))
    assert decoded.tokens == one_pass.tokens == 3 * 79
    torch.testing.assert_close(decoded.token_nll, one_pass.token_nll, rtol=0, atol=1e-3)
    assert torch.equal(decoded.top1, one_pass.top1)


@pytest.mark.parametrize("variant", bench.variants(80), ids=str)
def test_chunks_see_what_decoding_token_by_token_sees(variant: bench.Variant, model: Any) -> None:
    ids = torch.randint(2, 199, (2, 140), generator=torch.Generator().manual_seed(6))
    in_chunks = bench.decode_perplexity(model, ids, variant.make(model.config, 140))
    cache, logits = variant.make(model.config, 140), []
    with torch.inference_mode():
        for token in ids[:, :-1].split(1, dim=1):
            logits.append(model(input_ids=token, past_key_values=cache).logits)
    nll = torch.nn.functional.cross_entropy(torch.cat(logits, 1).flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    differences = (in_chunks.token_nll - nll).abs()
    # The last bits differ, so now and then a value is rounded to the next step, which moves the tokens behind it; what
    # the cache itself costs is more for nearly every token.
    assert float(differences.median()) < 1e-3
    assert float(differences.square().mean().sqrt()) < 0.1


def test_the_rows(model: Any, windows: torch.Tensor) -> None:
    rows = list(bench.rows(model, windows, bench.variants(80), Console(quiet=True)))
    assert len({(row["cache"], row["options"]) for row in rows}) == len(rows) >= 10
    assert rows[0]["cache"] == "StaticKVCache"
    assert rows[0]["ppl_change"] == rows[0]["rms"] == 0
    by_name = {f"{row['cache']} {row['options']}".strip(): row for row in rows}
    assert 0 < by_name["Int8KVCache"]["rms"] < by_name["Int4KIVICache"]["rms"] < by_name["NaiveInt4Cache"]["rms"]
    assert by_name["H2OKVCache kv_budget=80"]["rms"] < by_name["H2OKVCache kv_budget=20"]["rms"]
    assert by_name["NaiveInt4Cache"]["bytes_of_fp16"] is None
    assert by_name["StaticKVCache"]["bytes_of_fp16"] == 1
    assert set(rows[0]) | {"model", "device", "torch", "transformers", "commit"} == set(bench.COLUMNS)


def test_naive_int4_rounds_keys_token_by_token_and_nothing_else() -> None:
    config = make_llama().config
    key, value = torch.randn(2, 1, 2, 9, 16)
    for kind, least in ((bench.NaiveInt4Cache, 0.02), (bench.RotatedNaiveInt4Cache, 0.02)):
        whole, one_by_one = kind(config), kind(config)
        whole.update(key, value, 0)
        for token in range(9):
            one_by_one.update(key[:, :, token : token + 1], value[:, :, token : token + 1], 0)
        torch.testing.assert_close(whole.layers[0].keys, one_by_one.layers[0].keys, rtol=0, atol=1e-5)
        error = float((whole.layers[0].keys - key).norm() / key.norm())
        assert least < error < 0.12  # a step is a fifteenth of the range of a token, about 3.5 of its deviation
        assert torch.equal(whole.layers[0].values, value)


def test_bytes_are_those_that_the_formats_promise() -> None:
    config = make_llama(head_dim=64).config
    assert bench.Variant(Int8KVCache).bytes_of_fp16(config) == pytest.approx(66 / 128, abs=1e-4)
    assert bench.Variant(Int4KIVICache).bytes_of_fp16(config) == pytest.approx(72 / 256 + 68 / 4096, abs=1e-3)
