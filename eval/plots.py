"""Plots of measured CSV rows. Each function draws one figure and writes it to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

try:
    import matplotlib
except ImportError as error:
    raise ValueError("plots need matplotlib: pip install 'hf-fastpath[plots]'") from error

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator

_TITLES = {"hf_fastpath_int4": "hf_fastpath int4", "tinygemm_int4": "tinygemm int4", "torch_16bit": "torch 16-bit"}


def bandwidth_over_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """The int4 product's share of the copy rate over the rows of x, one panel an implementation, one line a shape.

    Args:
        rows: of ``hf_fastpath.eval.bench_gemm``.
        path: PNG, SVG or PDF, by its ending.
    """
    impls = list(dict.fromkeys(row["impl"] for row in rows))
    figure, axes = plt.subplots(1, len(impls), figsize=(4.2 * len(impls), 3.6), sharey=True, squeeze=False)
    for axis, impl in zip(axes[0], impls, strict=True):
        chosen = [row for row in rows if row["impl"] == impl]
        for shape in dict.fromkeys((row["k"], row["n"]) for row in chosen):
            line = [(int(row["m"]), row["gb_s"] / row["copy_gb_s"]) for row in chosen if (row["k"], row["n"]) == shape]
            axis.plot(*zip(*sorted(line), strict=True), marker="o", markersize=3, label=f"{shape[0]} x {shape[1]}")
        axis.set(title=_TITLES.get(impl, impl), xlabel="rows of x", xscale="log")
        axis.set_xticks(sorted({int(row["m"]) for row in rows}), sorted({str(row["m"]) for row in rows}, key=int))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set(ylabel="bytes moved / copy rate", ylim=(0, None))
    axes[0][-1].legend(title="in x out", fontsize="small")
    figure.suptitle(f"{rows[0]['device']}, torch {rows[0]['torch']}, {rows[0]['dtype']}", fontsize="small")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def attention_over_tokens(rows: list[dict[str, Any]], path: Path) -> None:
    """The time of decode attention over the tokens in the cache, one panel a batch size, one line a format.

    Args:
        rows: of ``hf_fastpath.eval.bench_attention``.
        path: PNG, SVG or PDF, by its ending.
    """
    batches = list(dict.fromkeys(int(row["batch"]) for row in rows))
    figure, axes = plt.subplots(1, len(batches), figsize=(4.6 * len(batches), 3.6), squeeze=False)
    for axis, batch in zip(axes[0], batches, strict=True):
        chosen = [row for row in rows if int(row["batch"]) == batch]
        for impl in dict.fromkeys(row["impl"] for row in chosen):
            line = [(int(row["tokens"]), float(row["us_p50"])) for row in chosen if row["impl"] == impl]
            style = {"color": "black", "linestyle": "--"} if impl == "sdpa" else {}
            axis.plot(*zip(*sorted(line), strict=True), marker="o", markersize=3, label=impl, **style)
        tokens = sorted({int(row["tokens"]) for row in chosen})
        axis.set(title=f"{batch} row" + ("s" if batch > 1 else ""), xlabel="tokens in the cache")
        axis.set(xscale="log", yscale="log")
        axis.set_xticks(tokens, [f"{count:,}" for count in tokens])
        axis.minorticks_off()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3, which="both")
    axes[0][0].set(ylabel="microseconds a layer")
    axes[0][-1].legend(fontsize="small")
    first = rows[0]
    heads = f"{first['heads']}/{first['kv_heads']} heads of {first['dim']}"
    figure.suptitle(f"{first['device']}, torch {first['torch']}, {heads}, {first['dtype']}", fontsize="small")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
