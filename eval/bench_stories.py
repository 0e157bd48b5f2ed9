"""What int4 and every KV cache cost the two story models: ``python -m hf_fastpath.eval.bench_stories --out FILE``.

Perplexity of the held-out stories in windows of 512 tokens, in float32, the quantized cache in the loop (each window is
read back as it was stored). Columns of the CSV, one row a model and a variant:

family               "lfm2" (an LFM2-MoE) or "gpt2"
weights, scale_search, kv_cache   how it was patched; empty: as it came
ppl, ppl_change, ppl_change_se   perplexity, its relative change from stock and that change's standard error
kl                   divergence of its predictions from stock's, nats a token
top1                 share of tokens with stock's most likely next token
head_change, head_se   the change and its standard error over the first ten windows alone, which CI measures again
tokens, device, torch, transformers, commit
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hf_fastpath import FastpathConfig, info, patch_model
from hf_fastpath.eval import compare, story_models
from hf_fastpath.eval.bench_ops import commit_of
from hf_fastpath.eval.loading import load
from hf_fastpath.eval.perplexity import Divergence, Perplexity

WINDOW, HEAD_WINDOWS = 512, 10
COLUMNS = (
    *("family", "weights", "scale_search", "kv_cache", "ppl", "ppl_change", "ppl_change_se", "kl", "top1"),
    *("head_change", "head_se", "tokens", "device", "torch", "transformers", "commit"),
)
SEARCHES = ("absmax", "mse", "activation", "output")
CACHES = ("static", "int8", "fp8", "int4", "h2o")

Row = dict[str, Any]


def variants() -> list[FastpathConfig]:
    """Every search with full-precision keys and values, every cache with the weights as they are, then the default."""
    base = FastpathConfig(kv_cache=None, kv_budget=WINDOW // 2, progress=False)
    searches = [dataclasses.replace(base, scale_search=search) for search in SEARCHES]  # type: ignore[arg-type]
    caches = [dataclasses.replace(base, weights=None, kv_cache=cache) for cache in CACHES]  # type: ignore[arg-type]
    return [*searches, *caches, dataclasses.replace(base, scale_search="output", kv_cache="int8")]  # type: ignore[arg-type]


def rows(
    family: str,
    todo: Iterable[FastpathConfig],
    console: Console,
    max_windows: int | None = None,
    device: str = "cpu",
) -> Iterator[Row]:
    """The stock model's row, then one for each of ``todo``, without the machine's columns.

    On a GPU the arithmetic is in the model's 16 bits, since the kernels' is.
    """
    stock: Perplexity | None = None
    divergence = Divergence()
    for config in (None, *todo):
        loaded = load(str(story_models.folder(family)), device, "auto")
        ids = torch.tensor(loaded.tokenizer(story_models.HELD_OUT.read_text(encoding="utf-8"), verbose=False).input_ids)
        settings = compare.Settings(ids, WINDOW, max_windows, float32_perplexity=device == "cpu")
        if config:
            patch_model(loaded.model, config)
        see = divergence.compare if stock else divergence.remember
        result = compare.measure(loaded.model, config, settings, console, on_logits=see).perplexity
        stock = stock or result
        change, error = result.change_from(stock)
        head_change, head_error = _head(result).change_from(_head(stock))
        int4 = config is not None and config.packs_linears
        yield {
            "family": family,
            "weights": config.weights.value if config and config.weights else None,
            "scale_search": config.scale_search.value if config and int4 else None,
            "kv_cache": config.kv_cache.value if config and config.kv_cache else None,
            "ppl": round(result.ppl, 4),
            "ppl_change": round(change, 6),
            "ppl_change_se": round(error, 6),
            "kl": round(divergence.take(), 6),
            "top1": round(result.top1_agreement(stock), 4),
            "head_change": round(head_change, 6),
            "head_se": round(head_error, 6),
            "tokens": result.tokens,
        }


def _head(result: Perplexity) -> Perplexity:
    tokens = HEAD_WINDOWS * (WINDOW - 1)
    return Perplexity.of(result.token_nll[:tokens], result.top1[:tokens])


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy of the story models; see the top of the file.")
    parser.add_argument("--out", type=Path, required=True, help="the CSV file to write")
    parser.add_argument("--commit", help="the commit to name in every row (default: asked of git)")
    arguments = parser.parse_args()
    console, versions = Console(), info.versions()
    machine = {
        "device": info.cpu_name(),
        "torch": versions["torch"],
        "transformers": versions["transformers"],
        "commit": arguments.commit or commit_of(Path(__file__).parent),
    }
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for family in story_models.FAMILIES:
            for row in rows(family, variants(), console):
                writer.writerow(row | machine)
                file.flush()
                console.print({name: row[name] for name in COLUMNS[:9]})


if __name__ == "__main__":
    main()
