"""The report of an evaluation: JSON with everything, Markdown and plots for people who decide."""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from hf_fastpath.eval.accuracy_reading import machine, reading
from hf_fastpath.eval.bench_ops import commit_of
from hf_fastpath.eval.significance import difference, standard_error
from hf_fastpath.eval.sweep import Candidate
from hf_fastpath.eval.task_data import WIKITEXT2, Benchmark
from hf_fastpath.eval.wikitext import TextScore

Row = dict[str, Any]
_ACCURACY = "Accuracy: stock's, and the change in percentage points (McNemar's p)"
_METRIC_COLUMNS = {"acc": 1, "acc_norm": 2}  # of an item


def assemble(
    candidates: Sequence[Candidate], results: Sequence[Row], benchmarks: Sequence[Benchmark], settings: Row
) -> Row:
    """Everything that is known, each candidate beside the first, which is the stock model.

    Raises:
        ValueError: the candidates were not asked the same questions.
    """
    rows = []
    for candidate, found in zip(candidates, results, strict=True):
        row: Row = {"name": candidate.name, "config": candidate.config.to_dict() if candidate.config else None}
        row |= found["speed"]
        if WIKITEXT2 in found:
            row[WIKITEXT2] = _perplexity(found[WIKITEXT2], results[0][WIKITEXT2])
        row["benchmarks"] = {
            benchmark.name: _benchmark(benchmark, found[benchmark.name], results[0][benchmark.name], settings["seed"])
            for benchmark in benchmarks
        }
        rows.append(row)
    modes = sorted({found[benchmark.name]["mode"] for found in results for benchmark in benchmarks})
    commit = commit_of(Path(__file__).parent)
    return {"settings": settings | {"commit": commit, "modes": modes}, "configurations": rows}


def _perplexity(found: Row, stock: Row) -> Row:
    score, reference = TextScore.from_dict(found), TextScore.from_dict(stock)
    change, error = score.change_from(reference)
    return {
        "token_perplexity": score.token_perplexity,
        "word_perplexity": score.word_perplexity,
        "bits_per_byte": score.bits_per_byte,
        "change": change,
        "change_se": error,
        "kl": score.kl,
        "top1": score.top1,
        "compared": score.compared,
        "predictions": score.predictions,
    }


def _benchmark(benchmark: Benchmark, found: Row, stock: Row, seed: int) -> Row:
    if found["prompts"] != stock["prompts"]:
        raise ValueError(f"{benchmark.name}: the stock model was asked other questions; delete the .parts folder")
    row: Row = {"shots": benchmark.shots, "tokens": found["tokens"], "metrics": found["metrics"]}
    if not found["items"]:
        return row
    column = _METRIC_COLUMNS[benchmark.metric]
    right, stock_right = ([item[column] for item in part["items"]] for part in (found, stock))
    likelihoods, stock_likelihoods = ([item[0] for item in part["items"]] for part in (found, stock))
    compared = difference(right, stock_right, likelihoods, stock_likelihoods, seed)
    chance = statistics.fmean(1 / len(choices) for choices in likelihoods)
    return row | {
        "metric": benchmark.metric,
        "questions": len(right),
        "accuracy": statistics.fmean(right),
        "accuracy_se": standard_error(right),
        "acc": statistics.fmean(item[1] for item in found["items"]),
        "chance": chance,
        **compared.to_dict(),
    }


def write(report: Row, out: Path) -> list[Path]:
    """``out.json``, ``out.md`` and, where matplotlib is installed, the plots."""
    out.with_name(f"{out.name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plots: list[Path] = []
    if importlib.util.find_spec("matplotlib"):
        from hf_fastpath.eval import accuracy_plots

        plots = accuracy_plots.draw(report, out)
    out.with_name(f"{out.name}.md").write_text(markdown(report, plots), encoding="utf-8")
    return plots


def main() -> None:
    """``python -m hf_fastpath.eval.accuracy_report OUT.json``: Markdown and plots of a report of another machine, and
    the two tables to paste into a document."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("report", type=Path, help="a report's JSON file")
    path = parser.parse_args().report
    report = json.loads(path.read_text(encoding="utf-8"))
    write(report, path.with_suffix(""))
    print("\n".join([*_summary(report), *machine(report["settings"])]))


def _summary(report: Row) -> list[str]:
    """What the configurations cost, as Markdown."""
    rows = report["configurations"]
    accuracy = _markdown_table(*_accuracies(rows), _ACCURACY) if _counted(rows) else []
    return _markdown_table(*_overview(rows), "Speed, memory, perplexity") + accuracy


def markdown(report: Row, plots: Sequence[Path] = ()) -> str:
    """The report to read."""
    settings, rows = report["settings"], report["configurations"]
    lines = [f"# {settings['model']}: what was paid for speed and memory", "", *machine(settings), ""]
    lines += _summary(report)
    for name, benchmark in rows[0]["benchmarks"].items():
        if "accuracy" in benchmark:
            title = f"{name}, {benchmark['shots']}-shot, {benchmark['questions']:,} questions, {benchmark['metric']}"
            lines += _markdown_table(*_questions(rows, name), title)
        else:
            lines += _markdown_table(*_plain(rows, name), f"{name}, {benchmark['shots']}-shot")
    lines += ["## How to read this", "", *(f"* {line}" for line in reading(report)), ""]
    lines += [f"![{path.stem}]({path.name})" for path in plots]
    return "\n".join(lines).rstrip() + "\n"


def tables(report: Row) -> list[Table]:
    """The overview and every accuracy's change, for the terminal."""
    rows = report["configurations"]
    found = [_table(*_overview(rows), f"{report['settings']['model']}: stock against patched")]
    if _counted(rows):
        found.append(_table(*_accuracies(rows), _ACCURACY))
    return found


def _counted(rows: Sequence[Row]) -> list[str]:
    """Benchmarks whose answers are right or wrong."""
    return [name for name, benchmark in rows[0]["benchmarks"].items() if "accuracy" in benchmark]


def _accuracies(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    names = _counted(rows)
    cells = [
        [row["name"], *(_accuracy(row["benchmarks"][name], first=row is rows[0]) for name in names)] for row in rows
    ]
    return ["", *(f"{name}, {rows[0]['benchmarks'][name]['shots']}-shot" for name in names)], cells


def _table(header: Sequence[str], cells: Sequence[Sequence[str]], title: str) -> Table:
    out = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for number, name in enumerate(header):
        out.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
    for line in cells:
        out.add_row(*line)
    return out


def _accuracy(benchmark: Row, first: bool) -> str:
    if first:
        error = benchmark["accuracy_se"]
        return f"{benchmark['accuracy']:.1%}" + (f" ± {error:.1%}" if error is not None else "")
    return f"{100 * benchmark['delta']:+.1f} pp ({benchmark['p']:.2g})"


def _overview(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    stock = rows[0]
    header = ["", *(["decode, tokens/s"] if stock["decode"] else []), "weights, MB", "KV, bytes/token"]
    header += ["perplexity", "change", "KL", "top-1"] if WIKITEXT2 in stock else []
    cells = []
    for row in rows:
        line = [row["name"]]
        if stock["decode"]:
            line.append(_with_change(row["decode"]["median"], stock["decode"]["median"], "{:.1f}"))
        line.append(_with_change(row["weight_bytes"] / 1e6, stock["weight_bytes"] / 1e6, "{:,.1f}"))
        line.append(_with_change(row["kv_bytes_per_token"], stock["kv_bytes_per_token"], "{:,}"))
        if WIKITEXT2 in stock:
            text = row[WIKITEXT2]
            line += [f"{text['token_perplexity']:.3f}"]
            line += ["", "", ""] if row is stock else [_change(text), _number(text["kl"]), _share(text["top1"])]
        cells.append(line)
    return header, cells


def _questions(rows: Sequence[Row], name: str) -> tuple[list[str], list[list[str]]]:
    header = ["", "accuracy", "change", "95% interval", "p", "lost / won", "other answers", "KL", "log-likelihoods"]
    cells = []
    for row in rows:
        found = row["benchmarks"][name]
        error = found["accuracy_se"]
        line = [row["name"], f"{found['accuracy']:.2%}" + (f" ± {error:.2%}" if error is not None else "")]
        if row is rows[0]:
            line += [""] * (len(header) - len(line))
        else:
            low, high = (100 * side for side in found["interval"])
            error = found["delta_se"]
            line += [
                f"{100 * found['delta']:+.2f} pp" + (f" ± {100 * error:.2f}" if error is not None else ""),
                f"{low:+.2f} to {high:+.2f}",
                f"{found['p']:.2g}",
                f"{found['lost']} / {found['won']}",
                f"{found['changed']:.1%}",
                f"{found['kl']:.4f}",
                f"± {found['likelihood_change']:.3f}",
            ]
        cells.append(line)
    return header, cells


def _plain(rows: Sequence[Row], name: str) -> tuple[list[str], list[list[str]]]:
    """lm-eval's own numbers of a task that is no multiple choice."""
    labels = [
        (leaf, metric)
        for leaf, metrics in rows[0]["benchmarks"][name]["metrics"].items()
        for metric in metrics
        if "stderr" not in metric and metric != "sample_len"
    ]
    header = ["", *(f"{leaf} {metric.split(',')[0]}" for leaf, metric in labels)]
    cells = [
        [row["name"], *(f"{row['benchmarks'][name]['metrics'][leaf][metric]:.5g}" for leaf, metric in labels)]
        for row in rows
    ]
    return header, cells


def _markdown_table(header: Sequence[str], cells: Sequence[Sequence[str]], title: str) -> list[str]:
    lines = [f"## {title}", "", "| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return [*lines, *("| " + " | ".join(line) + " |" for line in cells), ""]


def _with_change(value: float, stock: float, write: str) -> str:
    change = value / stock - 1
    return write.format(value) + ("" if abs(change) < 5e-4 else f" ({change:+.1%})")


def _change(text: Row) -> str:
    error = text["change_se"]
    return f"{text['change']:+.2%}" + (f" ± {error:.2%}" if error is not None else "")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


if __name__ == "__main__":
    main()
