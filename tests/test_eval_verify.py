"""The oracle: exact where nothing is lost, and it names the layer where something is."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_models import FAMILIES, make_llama

from hf_fastpath import FastpathConfig, patch_model
from hf_fastpath.eval import compare, story_models, verify
from hf_fastpath.eval.verify import Verdict, judge, layer_names, trace

IDS = torch.randint(2, 199, (24,), generator=torch.Generator().manual_seed(0))


def against_stock(model: Any, stock: Any, config: FastpathConfig | None) -> Verdict:
    oracle = trace(stock, IDS, 8, lambda: compare.empty_cache(stock, None))
    got = trace(model, IDS, 8, lambda: compare.empty_cache(model, config))
    return judge("it", layer_names(model.config), got, oracle)


@pytest.mark.parametrize("family", FAMILIES)
def test_lossless_mode_is_exact_in_every_layer(family: str) -> None:
    config = FastpathConfig(weights=None, kv_cache="static")  # type: ignore[arg-type]
    verdict = against_stock(patch_model(FAMILIES[family](), config), FAMILIES[family](), config)
    assert [layer.max_error for layer in verdict.layers] == [0.0] * len(verdict.layers)
    assert all(layer.least_cosine == pytest.approx(1, abs=1e-12) for layer in verdict.layers)
    assert verdict.max_kl == pytest.approx(0, abs=1e-12)
    assert verdict.top1 == 1
    assert verdict.prefix == verdict.generated == 8


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_is_close_and_not_exact(family: str) -> None:
    config, sizes = FastpathConfig(progress=False), {"initializer_range": 0.05}
    verdict = against_stock(patch_model(FAMILIES[family](**sizes), config), FAMILIES[family](**sizes), config)
    embeddings, *layers = verdict.layers
    assert embeddings.max_error == 0
    for layer in layers:
        assert 0.9 < layer.least_cosine <= layer.mean_cosine < 1 - 1e-6
    assert 1e-7 < verdict.kl <= verdict.max_kl < 0.5


def test_a_broken_layer_is_the_first_that_is_named() -> None:
    broken = make_llama(num_hidden_layers=4)
    with torch.no_grad():
        broken.model.layers[2].mlp.up_proj.weight.mul_(1.5)
    verdict = against_stock(broken, make_llama(num_hidden_layers=4), None)
    assert [layer.name for layer in verdict.layers if layer.max_error > 0] == ["2 attention", "3 attention"]
    assert verdict.kl > 1e-3


def test_divergence_and_prefix_are_what_they_say() -> None:
    hidden = [torch.tensor([[1.0, 0.0], [0.0, 2.0]])]
    oracle = verify.Trace(hidden, torch.tensor([[0.0, 0.0], [0.0, 1.0]]), [5, 6, 7])
    turned = [torch.tensor([[0.0, 1.0], [0.0, 2.0]])]
    got = verify.Trace(turned, torch.tensor([[0.0, torch.log(torch.tensor(3.0))], [0.0, 1.0]]), [5, 6, 8])
    verdict = judge("it", ["embeddings"], got, oracle)
    (layer,) = verdict.layers
    assert (layer.least_cosine, layer.mean_cosine) == pytest.approx((0, 0.5))
    assert layer.max_error == pytest.approx(1 / (5 / 4) ** 0.5)
    # Even odds against 1 : 3: the mean of log(1/2 / (1/4)) and log(1/2 / (3/4)).
    assert verdict.max_kl == pytest.approx(0.5 * (torch.log(torch.tensor(4 / 3))).item(), rel=1e-5)
    assert verdict.kl == pytest.approx(verdict.max_kl / 2)
    assert (verdict.top1, verdict.prefix, verdict.generated) == (0.5, 2, 3)


def run(request: verify.Request) -> tuple[list[Verdict], str]:
    out = io.StringIO()
    return verify.run(request, Console(file=out, width=120)), out.getvalue()


@pytest.mark.parametrize("family", story_models.FAMILIES)
def test_the_command_measures_prints_and_writes(family: str, tmp_path: Path) -> None:
    config = FastpathConfig(scale_search="absmax")  # type: ignore[arg-type]
    path = str(story_models.folder(family))
    request = verify.Request(
        config, path, story_models.HELD_OUT, "cpu", tokens=48, new_tokens=4, json=tmp_path / "numbers.json"
    )
    verdicts, printed = run(request)
    stock, patched = verdicts
    assert stock.kl < 0.01 < patched.kl < 0.5  # bf16 rounds to 8 bits, int4 to 4
    for part in ("0 convolution" if family == "lfm2" else "0 attention", "W4A16 + INT8 KV", "greedy prefix", "of 4"):
        assert part in printed
    written = json.loads((tmp_path / "numbers.json").read_text())
    assert written[1]["kl"] == patched.kl
    assert len(written[0]["layers"]) == len(stock.layers)


def test_mistakes_are_named(tmp_path: Path) -> None:
    path = str(story_models.folder("gpt2"))
    request = verify.Request(FastpathConfig(), path, tmp_path / "absent.txt", "cpu")
    with pytest.raises(ValueError, match=r"cannot read .*absent.txt"):
        run(request)
    with pytest.raises(ValueError, match="allowed are tokens >= 2"):
        run(verify.Request(FastpathConfig(), path, story_models.HELD_OUT, "cpu", tokens=1))
    (tmp_path / "short.txt").write_text("")
    with pytest.raises(ValueError, match="holds 1 tokens"):
        run(verify.Request(FastpathConfig(), path, tmp_path / "short.txt", "cpu"))
