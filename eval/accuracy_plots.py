"""The plots of an evaluation's report."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from hf_fastpath.eval.plots import plt
from hf_fastpath.eval.task_data import WIKITEXT2

Row = dict[str, Any]
_CONTEXT = 4096  # tokens whose cache counts into a configuration's memory


def draw(report: Row, out: Path) -> list[Path]:
    """The plots that the report has numbers for: ``out_tradeoff.png``, ``out_perplexity.png``, ``out_agreement.png``.

    Args:
        report: of :func:`hf_fastpath.eval.accuracy_report.assemble`.
    """
    settings = report["settings"]
    stock, *others = report["configurations"]
    note = f"{settings['model']}, {settings['device']}, torch {settings['versions']['torch']}, {settings['dtype']}"
    drawn: list[Path] = []
    if not others:
        return drawn
    if any("accuracy" in found for found in stock["benchmarks"].values()):
        drawn.append(_tradeoff(stock, others, note, out.with_name(f"{out.name}_tradeoff.png")))
    if WIKITEXT2 in stock:
        drawn.append(_perplexity(others, note, out.with_name(f"{out.name}_perplexity.png")))
        if all(row[WIKITEXT2]["kl"] is not None for row in others):
            drawn.append(_agreement(others, note, out.with_name(f"{out.name}_agreement.png")))
    return drawn


def memory(row: Row) -> float:
    """Bytes of the weights and of the cache of one sequence of 4,096 tokens, of which h2o keeps its budget."""
    config = row["config"] or {}
    kept = min(_CONTEXT, config["kv_budget"]) if config.get("kv_cache") == "h2o" else _CONTEXT
    return float(row["weight_bytes"] + kept * row["kv_bytes_per_token"])


def mean_delta(row: Row) -> tuple[float, float]:
    """The change of accuracy in the mean over the benchmarks, and its standard error, in percentage points."""
    found = [benchmark for benchmark in row["benchmarks"].values() if "accuracy" in benchmark]
    error = math.sqrt(sum((benchmark["delta_se"] or 0.0) ** 2 for benchmark in found)) / len(found)
    return 100 * statistics.fmean(benchmark["delta"] for benchmark in found), 100 * error


def _tradeoff(stock: Row, rows: list[Row], note: str, path: Path) -> Path:
    """Accuracy over speed and over memory, both relative to stock."""
    panels = [("memory of weights and 4,096 tokens, of stock's", [memory(row) / memory(stock) for row in rows])]
    if stock["decode"]:
        rate = stock["decode"]["median"]
        panels.insert(0, ("decode speed, of stock's", [row["decode"]["median"] / rate for row in rows]))
    figure, axes = plt.subplots(1, len(panels), figsize=(5.6 * len(panels), 4.4), sharey=True, squeeze=False)
    for axis, (label, places) in zip(axes[0], panels, strict=True):
        for row, place in zip(rows, places, strict=True):
            delta, error = mean_delta(row)
            axis.errorbar(place, delta, yerr=error, marker="o", markersize=4, capsize=2, label=row["name"])
        axis.axhline(0, color="black", linewidth=0.8)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set(xlabel=label)
        axis.grid(alpha=0.3)
    axes[0][0].set(ylabel="accuracy, change from stock, percentage points\n(mean of the benchmarks, ± standard error)")
    axes[0][-1].legend(fontsize="x-small")
    return _save(figure, note, path)


def _perplexity(rows: list[Row], note: str, path: Path) -> Path:
    figure, axis = plt.subplots(figsize=(6.4, 0.35 * len(rows) + 1.4))
    found = [row[WIKITEXT2] for row in rows]
    errors = [100 * (text["change_se"] or 0.0) for text in found]
    axis.barh([row["name"] for row in rows], [100 * text["change"] for text in found], xerr=errors, capsize=2)
    axis.invert_yaxis()
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set(xlabel="WikiText-2 perplexity, change from stock in %")
    axis.grid(alpha=0.3, axis="x")
    return _save(figure, note, path)


def _agreement(rows: list[Row], note: str, path: Path) -> Path:
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 0.35 * len(rows) + 1.4), sharey=True)
    names = [row["name"] for row in rows]
    axes[0].barh(names, [row[WIKITEXT2]["kl"] for row in rows])
    axes[0].set(xlabel="KL from stock, nats a token")
    axes[1].barh(names, [100 * (1 - row[WIKITEXT2]["top1"]) for row in rows])
    axes[1].set(xlabel="tokens with another likeliest token, %")
    axes[0].invert_yaxis()
    for axis in axes:
        axis.grid(alpha=0.3, axis="x")
    return _save(figure, note, path)


def _save(figure: Any, note: str, path: Path) -> Path:
    figure.suptitle(note, fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
