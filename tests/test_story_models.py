"""The models that ship with the package: what they are, that they write, and what quantizing them may cost."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from hf_fastpath import FastpathConfig, Unsupported, patch_model
from hf_fastpath.cli_options import shipped
from hf_fastpath.eval import bench_stories, story_models
from hf_fastpath.eval.loading import load
from hf_fastpath.modules import PackedLinear

RESULTS = Path(bench_stories.__file__).parent / "results" / "accuracy_stories.csv"
families = pytest.mark.parametrize("family", story_models.FAMILIES)


def recorded() -> dict[tuple[str, ...], dict[str, str]]:
    """The rows of the full measurement, by family, weights, search and cache."""
    with RESULTS.open() as file:
        return {
            (row["family"], row["weights"], row["scale_search"], row["kv_cache"]): row for row in csv.DictReader(file)
        }


def measured(family: str, todo: list[FastpathConfig]) -> list[dict[str, Any]]:
    """The first windows: the stock model's row, then one for each configuration."""
    return list(bench_stories.rows(family, todo, Console(file=io.StringIO()), bench_stories.HEAD_WINDOWS))


@families
def test_they_fit_the_kernels_and_the_repository(family: str) -> None:
    config = load(str(story_models.folder(family)), "cpu", "auto").model.config
    assert config.hidden_size % 128 == 0
    assert config.hidden_size // config.num_attention_heads == 64
    if family == "lfm2":
        assert config.moe_intermediate_size % 128 == 0
        assert {"conv", "full_attention"} == set(config.layer_types)
    assert sum(path.stat().st_size for path in story_models.FOLDER.rglob("*.safetensors")) < 15e6


@families
def test_they_write_words_of_stories(family: str) -> None:
    loaded = load(str(story_models.folder(family)), "cpu", "auto")
    known = {word.strip('.,!?"<>').lower() for word in story_models.HELD_OUT.read_text(encoding="utf-8").split()}
    prompt = torch.tensor([loaded.tokenizer("Once upon a time").input_ids])
    patch_model(loaded.model, scale_search="activation", progress=False)
    written = loaded.tokenizer.decode(loaded.model.generate(prompt, max_new_tokens=60, do_sample=False)[0])
    words = [word.strip('.,!?"').lower() for word in written.removeprefix("<bos>").split()]
    assert len(words) > 30
    # 160 stories do not hold every word of the language, and a cut last word is none.
    assert sum(word in known for word in words) >= 0.9 * len(words)
    assert len(set(words)) >= 0.4 * len(words)  # and it does not repeat itself


def bound(row: dict[str, str]) -> float:
    """What a change in perplexity may be on the windows that it was measured on before.

    Another CPU or version rounds a few values to their other neighbour. That gives some tokens other errors of the same
    size: were it all of them, the mean would move by sqrt(2) standard errors in two of three cases; it is fewer than
    one in ten, so by less than half of one, and two are four times that.
    """
    return float(row["head_change"]) + 2 * float(row["head_se"])


@families
def test_no_format_costs_more_than_it_did(family: str) -> None:
    todo = [config for config in bench_stories.variants() if config.scale_search.value not in ("mse", "output")]
    before = recorded()
    stock, *rows = measured(family, todo)
    assert stock["ppl"] < 5
    for row in rows:
        known = before[tuple(row[name] or "" for name in bench_stories.COLUMNS[:4])]
        assert row["ppl_change"] <= bound(known), known
        if row["kv_cache"] == "static":
            assert row["ppl_change"] == 0


@families
def test_a_small_fault_would_be_seen(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales of the next 16 rows, in a single layer."""
    config = FastpathConfig(kv_cache=None, scale_search="activation", progress=False)  # type: ignore[arg-type]
    patch = bench_stories.patch_model

    def faulty(model: Any, *args: Any) -> None:
        layer = next(module for module in patch(model, *args).modules() if isinstance(module, PackedLinear))
        layer.scales = layer.scales.roll(1, 0)

    monkeypatch.setattr(bench_stories, "patch_model", faulty)
    _, row = measured(family, [config])
    assert row["ppl_change"] > bound(recorded()[(family, "w4a16", "activation", "")])


def test_what_does_not_ship_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="allowed are 'lfm2', 'gpt2'"):
        story_models.folder("llama")
    with pytest.raises(ValueError, match="leave out --model"):
        shipped("gpt2", "some/model", None)
    assert shipped(None, "some/model", None) == ("some/model", None)
    assert shipped("gpt2", None, None) == (str(story_models.FAMILIES["gpt2"]), story_models.HELD_OUT)
    monkeypatch.setitem(story_models.FAMILIES, "lfm2", tmp_path)
    with pytest.raises(Unsupported, match="without its data files"):
        story_models.folder("lfm2")
