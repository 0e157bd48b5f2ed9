"""Tables of ``hf-fastpath bench generate``: for the terminal, and in Markdown, which
``python -m hf_fastpath.eval.generate_tables FILE...`` prints of its CSV files, those of ``--profile`` too."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from hf_fastpath.eval import profile_decode

Row = dict[str, Any]


def summary(rows: list[Row]) -> Table:
    """One line a measurement, with how many times stock's speed it is where stock was measured alike. What none has is
    left out."""
    first = rows[0]
    title = f"generate() of {first['model']}, {first['dtype']}, on {first['device']}"
    out = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    lines = [_cells(row, rows) for row in rows]
    shown = [name for name in lines[0] if any(line[name] for line in lines)]
    for name in shown:
        if name in (
            "variant",
            "sampling",
        ):  # other columns' names may break; in these a row could not be told by its rest
            out.add_column(name, min_width=max(len(line[name]) for line in lines))
        else:
            out.add_column(name, justify="right")
    for line in lines:
        out.add_row(*(line[name] for name in shown))
    return out


def _cells(row: Row, rows: list[Row]) -> dict[str, str]:
    """A line of :func:`summary` by its columns."""
    return {
        "variant": row["variant"],
        "sampling": row["choice"],
        "rows": str(row["batch"]),
        "prompt": f"{row['prompt']:,}",
        "tokens/s": f"{row['tok_s']:,.1f}{_against(row, rows)}",
        "of limit": f"{row['of_limit']:.0%}",
        "graphs alone": f"{row['replay_tok_s']:,.1f}" if row.get("replay_tok_s") else "",
        "first token, ms": f"{row['first_token_ms']:,.1f}",
        "set-up, s": f"{row['setup_s']:.1f}",
        "peak GB": str(row["peak_gb"]),
    }


def caption(rows: list[Row]) -> str:
    """What the columns of :func:`summary` are measured against."""
    first = rows[0]
    lines = [
        f"torch {first['torch']}, transformers {first['transformers']}, commit {first['commit'] or 'unknown'}; "
        f"a large copy runs at {first['copy_gb_s']:,.0f} GB/s, which is what `of limit` is of.",
    ]
    patched = {row["variant"]: row for row in rows if row.get("patch_s") is not None}
    for name, row in patched.items():
        how = f", scale_search={row['scale_search']!r} (changes no speed)" if row["scale_search"] else ""
        lines.append(f"{name}: patched in {row['patch_s']} s{how}; {row['weight_gb']} GB of weights.")
    if not first["peak_gb"]:
        lines.append("Not measured on a CPU: memory, CUDA graphs.")
    return "\n".join(lines)


def _against(row: Row, rows: list[Row]) -> str:
    same = ("choice", "batch", "prompt")
    stock = [r for r in rows if r["variant"] == "stock" and all(r[name] == row[name] for name in same)]
    return f" ({row['tok_s'] / stock[0]['tok_s']:.1f}x)" if stock and row is not stock[0] else ""


def markdown(rows: list[Row]) -> str:
    """Of CSV rows, as strings: a line a model, variant, choice and prompt, its batch sizes side by side."""
    batches = sorted({int(row["batch"]) for row in rows})
    sizes = " / ".join(map(str, batches))
    lines = [
        f"| model | variant | prompt | tokens/s, {sizes} rows | of the limit | first token, ms | peak memory, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, ...], dict[int, Row]] = {}
    for row in rows:
        key = row["model"], row["variant"], row["choice"], row["prompt"]
        groups.setdefault(key, {})[int(row["batch"])] = row
    for (model, variant, choice, prompt), found in groups.items():
        name = variant if choice == "greedy" else f"{variant}, {choice}"
        cells = [_side_by_side(found, batches, column) for column in ("tok_s", "of_limit", "first_token_ms", "peak_gb")]
        lines.append(f"| {' | '.join((model, name, f'{int(prompt):,}', *cells))} |")
    return "\n".join(lines)


def _side_by_side(found: dict[int, Row], batches: list[int], column: str) -> str:
    shapes = {"tok_s": "{:,.0f}", "of_limit": "{:.0%}", "first_token_ms": "{:,.0f}", "peak_gb": "{:.1f}"}
    values = [found[batch][column] if batch in found else "" for batch in batches]
    return " / ".join(shapes[column].format(float(value)) if value not in ("", None) else "-" for value in values)


_PROFILE = ("model", "variant", "choice", "batch", "prompt", "phase")  # what one profile's rows have in common


def _head(row: Row) -> str:
    what = row["choice"]
    if row["phase"] == profile_decode.PROMPT:
        what = f"a prompt of {row['prompt']}" + ("" if what == "greedy" else f", {what}")
    return f"{row['model']}, {row['variant']}, {row['batch']} row(s), {what}"


def profile_markdown(rows: list[Row]) -> str:
    """Of the CSV rows of profiles, as strings: a line a role, a column a profile: nodes and microseconds a token,
    or a prompt."""
    profiles: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        profiles.setdefault(tuple(row[name] for name in _PROFILE), []).append(row)
    heads = [_head(each[0]) for each in profiles.values()]
    found = [profile_decode.roles(each) for each in profiles.values()]
    lines = [f"| nodes, us | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for role in dict.fromkeys(role for each in found for role in each):
        lines.append(f"| {role} | {' | '.join(_nodes_and_us(each.get(role, [])) for each in found)} |")
    firsts = [each[0] for each in profiles.values()]
    totals = {
        "all": [f"{float(row['nodes_total']):g}, {float(row['sum_us']):,.0f}" for row in firsts],
        "time": [f"{float(row['wall_us']):,.0f} us" for row in firsts],
        "of it no kernel runs": [f"{float(row['idle_us']):,.0f} us" for row in firsts],
    }
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in totals.items()]
    return "\n".join(lines)


def _nodes_and_us(rows: list[Row]) -> str:
    if not rows:
        return "-"
    nodes, us = (sum(float(row[name]) for row in rows) for name in ("nodes", "us"))
    return f"{nodes:g}, {us:,.1f}"


def main(paths: Iterable[str]) -> None:
    """Prints Markdown of CSV files, files of one kind as one table.

    Raises:
        ValueError: a file is neither of ``bench generate`` nor of its ``--profile``.
    """
    measured: list[Row] = []
    profiled: list[Row] = []
    for path in map(Path, paths):
        found = read_csv(path)
        if not found:
            raise ValueError(f"{path}: not a CSV of `hf-fastpath bench generate`")
        (profiled if "role" in found[0] else measured).extend(found)
    for rows, render in ((measured, markdown), (profiled, profile_markdown)):
        if rows:
            print(render(rows), end="\n\n")


def read_csv(path: Path) -> list[Row]:
    """Rows of ``bench generate`` or of its ``--profile``, as strings; none of a file that is something else."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows: list[Row] = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    return rows if rows and {"model", "variant", "choice"} <= set(rows[0]) else []


if __name__ == "__main__":
    main(sys.argv[1:])
