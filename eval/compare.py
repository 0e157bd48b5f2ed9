"""One model measured as it came and as patched: speed, memory and perplexity of each variant, and their table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import DynamicCache

from hf_fastpath import FastpathConfig
from hf_fastpath.eval.measure import Rate, cache_bytes_per_token, decode_rates, float32_parameters, weight_bytes
from hf_fastpath.eval.perplexity import Perplexity, perplexity
from hf_fastpath.generation import CACHES


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured: ``token_ids`` for the perplexity; ``prompt`` (generate()'s inputs) for the speed, or None.

    ``float32_perplexity``: compute the perplexity in float32, whatever the model's dtype.
    """

    token_ids: torch.Tensor
    window: int
    max_windows: int | None = None
    float32_perplexity: bool = False
    prompt: dict[str, torch.Tensor] | None = None
    new_tokens: int = 32
    runs: int = 5


@dataclasses.dataclass(frozen=True)
class Measured:
    """The numbers of one variant."""

    title: str
    weight_bytes: int
    kv_bytes_per_token: int
    perplexity: Perplexity
    decode: Rate | None = None

    def to_dict(self, stock: Measured) -> dict[str, Any]:
        """Plain JSON types, with the changes from ``stock``."""
        change, error = self.perplexity.change_from(stock.perplexity)
        return {
            "variant": self.title,
            "decode_tokens_per_s": dataclasses.asdict(self.decode) if self.decode else None,
            "weight_bytes": self.weight_bytes,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "perplexity": self.perplexity.ppl,
            "perplexity_tokens": self.perplexity.tokens,
            "perplexity_change": change,
            "perplexity_change_standard_error": error,
            "top1_agreement": self.perplexity.top1_agreement(stock.perplexity),
        }


def describe(config: FastpathConfig | None) -> str:
    """A column's title, such as ``"W4A16 + INT8 KV"``; None is the model as it came."""
    if config is None:
        return "stock"
    parts = [config.weights.value.upper()] if config.weights else []
    parts += [f"{config.lm_head.value.upper()} head"] if config.lm_head else []
    parts += [f"{config.kv_cache.value.upper()} KV"] if config.kv_cache else []
    return " + ".join(parts) + (" only" if len(parts) == 1 else "") if parts else "patched, nothing changed"


def variants(config: FastpathConfig) -> list[FastpathConfig]:
    """What to compare with the stock model: ``config``, and before it the cache format alone where it has more."""
    cache_alone = dataclasses.replace(config, weights=None, lm_head=None)
    return [cache_alone, config] if (config.weights or config.lm_head) and config.kv_cache else [config]


def empty_cache(model: Any, config: FastpathConfig | None) -> Any:
    """A cache in which every token, the prompt's too, is read back as it is stored.

    In one pass over a text, fp8 and int4 round the latest tokens of all queries but the last ones too, which decoding
    has in full precision: what they cost is overstated a little (``eval/bench_kv_accuracy.py`` decodes).
    """
    if config is None or config.kv_cache is None:
        return DynamicCache(config=model.config)
    strict = {"fresh_prefill": False} if config.kv_cache.compressed else {}
    return CACHES[config.kv_cache](model.config, **strict, **config.cache_options)


def measure(
    model: Any,
    config: FastpathConfig | None,
    settings: Settings,
    console: Console,
    on_logits: Callable[[torch.Tensor], None] | None = None,
) -> Measured:
    """Measures ``model`` as it stands; ``config`` is what it was patched with, None for a stock model.

    ``on_logits``: see :func:`hf_fastpath.eval.perplexity.perplexity`.
    """
    title = describe(config)
    rate = None
    if settings.prompt is not None:
        with bar(console, f"{title}: decode speed") as step:
            rate = decode_rates(model, settings.prompt, settings.new_tokens, settings.runs, step)
    precision = float32_parameters(model) if settings.float32_perplexity else nullcontext()
    with precision, bar(console, f"{title}: perplexity") as step:
        result = perplexity(
            model,
            settings.token_ids,
            settings.window,
            max_windows=settings.max_windows,
            cache_factory=lambda: empty_cache(model, config),
            progress=step,
            on_logits=on_logits,
        )
    kv_bytes = cache_bytes_per_token(model, empty_cache(model, config))
    # The weights come last: on the CPU a packed layer takes its final layout at its first use.
    return Measured(title, weight_bytes(model), kv_bytes, result, rate)


@contextmanager
def bar(console: Console, label: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar; yields what to call with (done, total)."""
    columns = (TextColumn("{task.description:40}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total, refresh=True)


def table(results: list[Measured], title: str) -> Table:
    """Metrics down, variants across (the first is the reference), each with its change."""
    stock = results[0]
    out = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    out.add_column("")
    for result in results:
        out.add_column(result.title, justify="right")
    rates = [result.decode.median for result in results if result.decode]
    if rates:
        out.add_row("decode, tokens/s", *_cells(rates, lambda rate: f"{rate:.1f}"))
    out.add_row("weights, MB", *_cells([r.weight_bytes for r in results], lambda size: f"{size / 1e6:.1f}"))
    out.add_row("KV cache, bytes/token", *_cells([r.kv_bytes_per_token for r in results], lambda size: f"{size:,}"))
    out.add_row("perplexity", *(_perplexity_cell(r, stock) for r in results))
    agreement = [f"{r.perplexity.top1_agreement(stock.perplexity):.1%}" for r in results[1:]]
    out.add_row("same best token as stock", "", *agreement)
    return out


def _cells(values: Sequence[float], write: Callable[[Any], str]) -> list[str]:
    """A row's cells: the stock model's value, then the others' with their change from it."""
    stock, *others = values
    return [f"{write(stock)}\n", *(f"{write(value)}\n{value / stock - 1:+.1%}" for value in others)]


def _perplexity_cell(result: Measured, stock: Measured) -> str:
    text = f"{result.perplexity.ppl:.3f}\n"
    if result is stock:
        return text
    change, error = result.perplexity.change_from(stock.perplexity)
    return f"{text}{change:+.2%} ± {error:.2%}"
