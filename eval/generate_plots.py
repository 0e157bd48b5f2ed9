"""Plots of ``hf-fastpath bench generate``: tokens a second over the rows of a batch, and over the prompt's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_fastpath.eval.plots import LogLocator, plt

Row = dict[str, Any]


def check(path: Path) -> None:
    """Raises ValueError for a file that no plot can be written to."""
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"{path}: a plot is a .png, .svg or .pdf file")


def draw(rows: list[Row], path: Path) -> list[str]:
    """Draws what there are several sizes of: ``path`` has the batch sizes with the shortest prompt, and where there are
    several prompts ``NAME_context`` beside it those, with the smallest batch.

    Args:
        rows: of ``hf_fastpath.eval.bench_generate``.
        path: PNG, SVG or PDF, by its ending.

    Returns the names of the files.
    """
    shortest, smallest = (min(int(row[name]) for row in rows) for name in ("prompt", "batch"))
    _lines([row for row in rows if int(row["prompt"]) == shortest], "batch", "rows", f"prompt of {shortest:,}", path)
    if len({int(row["prompt"]) for row in rows}) == 1:
        return [str(path)]
    beside = path.with_stem(f"{path.stem}_context")
    chosen = [row for row in rows if int(row["batch"]) == smallest]
    _lines(chosen, "prompt", "tokens of the prompt", f"{smallest} row(s)", beside)
    return [str(path), str(beside)]


def _lines(rows: list[Row], column: str, label: str, fixed: str, path: Path) -> None:
    """Tokens a second over a column, a panel a model, one line a variant and way to choose tokens."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(1, len(models), squeeze=False, sharey=True, figsize=(5.6 * len(models), 4.4))
    for axis, model in zip(axes[0], models, strict=True):
        _panel(axis, [row for row in rows if row["model"] == model], column)
        axis.set(xlabel=label, title=model)
    axes[0][0].set(ylabel="tokens/s")
    first = rows[0]
    figure.suptitle(f"{first['dtype']}, {fixed}, {first['device']}, torch {first['torch']}", fontsize="small")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _panel(axis: Any, rows: list[Row], column: str) -> None:
    for variant, choice in dict.fromkeys((row["variant"], row["choice"]) for row in rows):
        chosen = [row for row in rows if (row["variant"], row["choice"]) == (variant, choice)]
        line = sorted((int(row[column]), float(row["tok_s"])) for row in chosen)
        name = variant if choice == "greedy" else f"{variant}, {choice}"
        style: dict[str, Any] = (
            {"color": "black", "linestyle": "--"} if variant == "stock" and choice == "greedy" else {}
        )
        axis.plot(*zip(*line, strict=True), marker="o", markersize=3, label=name, **style)
    ticks = sorted({int(row[column]) for row in rows})
    axis.set(xscale="log", yscale="log")
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.minorticks_off()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize="x-small", loc="lower right")
