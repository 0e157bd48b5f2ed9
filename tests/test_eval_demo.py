"""The demo's job from end to end on a tiny model: what it measures, prints and writes."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_models import make_llama, make_tokenizer

from hf_fastpath import FastpathConfig, Unsupported, patching
from hf_fastpath.eval import compare, demo
from hf_fastpath.eval.loading import load, pick_device

CONFIG = FastpathConfig(group_size=32, progress=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint that ``from_pretrained`` loads: a tiny Llama and a tokenizer that knows 197 words."""
    model = make_llama(torch.bfloat16)
    target = tmp_path / "tiny"
    model.save_pretrained(target)
    make_tokenizer().save_pretrained(target)
    return target


@pytest.fixture
def request_(folder: Path, tmp_path: Path) -> demo.Request:
    text = tmp_path / "text.txt"
    text.write_text("a b c dd e f g aa b zz " * 10)
    return demo.Request(
        CONFIG, model=str(folder), device="cpu", prompt="a b c", new_tokens=4, text=text, window=40, max_windows=2
    )


def run(request: demo.Request) -> tuple[list[compare.Measured], str]:
    out = io.StringIO()
    return demo.run(request, Console(file=out, width=100)), out.getvalue()


def test_perplexity_is_computed_in_float32_on_the_cpu(request_: demo.Request, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    perplexity = compare.perplexity

    def recorded(model: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(model.dtype)
        return perplexity(model, *args, **kwargs)

    monkeypatch.setattr(compare, "perplexity", recorded)
    run(request_)
    monkeypatch.setattr(demo, "_FLOAT32_PARAMETERS", 0)  # a model too large for it
    run(request_)
    assert seen == [torch.float32] * 3 + [torch.bfloat16] * 3


def test_calibration_text_reaches_the_int4_weights(request_: demo.Request, tmp_path: Path, count_calls: Any) -> None:
    text = tmp_path / "read.txt"
    text.write_text("b a dd c zz " * 4000)
    calls = count_calls(patching, "quantize_blockwise")
    numbers = tmp_path / "numbers.json"
    run(dataclasses.replace(request_, calibration=text, new_tokens=0, json=numbers))
    (call,) = calls
    assert call[-1].shape == (64, 256)
    assert json.loads(numbers.read_text())["calibration"] == "read.txt"


def test_calibration_that_cannot_be_used_is_refused_before_it_is_measured(
    request_: demo.Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "measure", lambda *args: pytest.fail("measured"))
    with pytest.raises(ValueError, match="calibration text holds 100 tokens"):
        run(dataclasses.replace(request_, calibration=request_.text))
    no_weights = dataclasses.replace(CONFIG, weights=None)
    with pytest.raises(ValueError, match="--calibration is for int4 weights"):
        run(dataclasses.replace(request_, calibration=request_.text, config=no_weights))
    searched = dataclasses.replace(CONFIG, scale_search="mse")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="--scale-search output"):
        run(dataclasses.replace(request_, calibration=request_.text, config=searched))


def test_a_model_that_cannot_be_patched_is_refused_before_it_is_measured(
    request_: demo.Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "measure", lambda *args: pytest.fail("measured"))
    monkeypatch.setattr(demo, "find_recipe", raise_unsupported)
    with pytest.raises(Unsupported, match="not a supported model"):
        run(request_)


def raise_unsupported(model: Any) -> None:
    raise Unsupported("not a supported model")


def test_measures_stock_and_every_variant(request_: demo.Request, capsys: pytest.CaptureFixture[str]) -> None:
    results, printed = run(request_)
    assert [result.title for result in results] == ["stock", "INT8 KV only", "W4A16 + INT8 KV"]
    stock, cache_only, full = results
    assert stock.weight_bytes == cache_only.weight_bytes > full.weight_bytes
    assert stock.kv_bytes_per_token == 2 * 2 * 2 * 16 * 2
    assert cache_only.kv_bytes_per_token == full.kv_bytes_per_token == 2 * 2 * 2 * (16 + 2)
    assert all(result.decode and result.decode.median > 0 for result in results)
    assert {result.perplexity.tokens for result in results} == {2 * 39}
    assert len({result.perplexity.ppl for result in results}) == 3  # quantizing shows
    assert capsys.readouterr().out.strip()  # the streamed generation
    for words in ("tiny: stock against patched", "perplexity", "torch", "median of 5", "± "):
        assert words in printed


def test_json_holds_the_numbers_of_the_table(request_: demo.Request, tmp_path: Path) -> None:
    target = tmp_path / "numbers.json"
    results, printed = run(dataclasses.replace(request_, json=target))
    written = json.loads(target.read_text())
    assert FastpathConfig(**written["config"]) == CONFIG
    assert [row["perplexity"] for row in written["results"]] == [result.perplexity.ppl for result in results]
    assert written["results"][0]["perplexity_change"] == 0
    for result in results:
        assert f"{result.perplexity.ppl:.3f}" in printed
        assert result.decode
        assert f"{result.decode.median:.1f}" in printed


def test_without_new_tokens_only_perplexity_is_measured(
    request_: demo.Request, capsys: pytest.CaptureFixture[str]
) -> None:
    results, printed = run(dataclasses.replace(request_, new_tokens=0))
    assert [result.decode for result in results] == [None] * 3
    assert "tokens/s" not in printed
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("overrides", "titles"),
    [
        ({}, ["INT8 KV only", "W4A16 + INT8 KV"]),
        ({"weights": None}, ["INT8 KV only"]),
        ({"kv_cache": None}, ["W4A16 only"]),
        ({"kv_cache": "static"}, ["STATIC KV only", "W4A16 + STATIC KV"]),
    ],
)
def test_variants(overrides: dict[str, str | None], titles: list[str]) -> None:
    assert [compare.describe(config) for config in compare.variants(FastpathConfig(**overrides))] == titles


def test_an_unreadable_text_is_named(request_: demo.Request, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.txt"):
        run(dataclasses.replace(request_, text=tmp_path / "nowhere.txt"))


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"cannot load .*absent"):
        load(str(tmp_path / "absent"), "cpu", "bf16")


def test_bad_devices_and_dtypes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(Unsupported, match="no CUDA GPU"):
        pick_device("cuda")
    with pytest.raises(ValueError, match="'auto', 'cpu', 'cuda'"):
        pick_device("tpu")
    with pytest.raises(ValueError, match="'bf16', 'fp16', 'fp32'"):
        load(None, "cpu", "int8")
