"""What runs on the GPU for one token of a patched model, and for a prompt of any model: kernels by role, for
``hf-fastpath bench generate --profile``.

The graphs of a token are replayed under torch.profiler; a prompt is one generate() call with one new token. One row of
the CSV is one kernel with one grid; columns:

model, variant, choice, batch, prompt   see hf_fastpath.eval.bench_generate
phase            "token" or "prompt"
role             see :func:`role_of`; head: the last product of a step or a prompt
kernel, grid     its name without namespaces, its CTAs
nodes            how often it runs for a token, or for a prompt
us               microseconds for it, summed over its nodes
share            us over the sum of all kernels' us
nodes_total, sum_us   of all kernels
wall_us, idle_us the time from the first kernel to the end of the last one, and how much of it no kernel ran. Of a
                 prompt, what first_token_ms has more is the host's time before the first kernel; and each launch takes
                 longer under the profiler
device, torch, transformers, commit

A kernel that is launched early (programmatic dependent launch) runs while the one before it still does, waits for that
one part of its time, and both are counted: so ``sum_us`` is more than ``wall_us``.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from hf_fastpath.eval.graph_replay import Replay

COLUMNS = (
    *("model", "variant", "choice", "batch", "prompt", "phase", "role", "kernel", "grid", "nodes", "us", "share"),
    *("nodes_total", "sum_us", "wall_us", "idle_us", "device", "torch", "transformers", "commit"),
)
TOKENS = 16  # that are replayed for each measurement
PROMPTS = 3  # that are measured, one at a time; the one of median length counts
TOKEN, PROMPT = "token", "prompt"
PRODUCT, HEAD, CHOICE, OTHER = "product", "head", "choice", "other"
NOTHING_SEEN = "the profiler saw no kernel: it may need permission to use the GPU's counters"
OVERLAP = "kernels that are launched early overlap the one before, so their sum is more than the time of a token"

# The first pattern that is found in the name of a kernel of ours, without its template arguments, gives its role.
_OURS = (
    ("router", r"router"),
    ("norm", r"norm"),
    ("attention", r"attn|h2o_count"),
    ("append", r"append|finish_chunk|::kv"),
    ("angles", r"rope_angles"),
    ("embedding", r"embedding"),
    ("experts", r"moe|expert|gate_up|down_kernel|grouped|sort_kernel|gather|combine"),
    (CHOICE, r"best_of_parts|note_tokens|sampling"),
    ("activation", r"swiglu|gelu|silu"),
    (PRODUCT, r"linear|gemm|gemv|product"),
    ("convolution", r"conv|step_kernel|chunks_kernel"),
)
_TORCHS = (  # in the whole name
    ("attention", r"flash|fmha|attention"),
    (PRODUCT, r"gemm|gemv|nvjet|cutlass|cublas|splitK|splitk"),
    (CHOICE, r"ArgMax|[sS]oft[mM]ax|exponential|cumsum|scan|multinomial|[sS]ort"),
    ("convolution", r"conv"),
)

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One execution: when it started and how long it took, in microseconds."""

    name: str
    grid: tuple[int, ...]
    start: float
    us: float


def role_of(name: str) -> str:
    """attention, append, angles, embedding, norm, product, router, experts, activation, convolution, choice; else
    other, which is what torch does."""
    ours = "hf_fastpath" in name
    text = re.split(r"[<(](?!anonymous)", name)[0] if ours else name
    for role, pattern in _OURS if ours else _TORCHS:
        if re.search(pattern, text.replace("hf_fastpath", "")):
            return role
    return OTHER


def short_name(name: str) -> str:
    """Without return type, parameters and namespaces; template arguments stay."""
    name = re.sub(r"\(anonymous namespace\)::", "", name.removeprefix("void "))
    depth = 0
    for i, character in enumerate(name):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0 and i:
            name = name[:i]
            break
    return re.sub(r"\b\w+::", "", name)


def read_trace(trace: dict[str, Any]) -> list[Kernel]:
    """Kernels, copies and fills of a Chrome trace of torch.profiler, in the order of their start."""
    found = [
        Kernel(event["name"], tuple(event.get("args", {}).get("grid", ())), float(event["ts"]), float(event["dur"]))
        for event in trace["traceEvents"]
        if event.get("ph") == "X" and event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    return sorted(found, key=lambda kernel: kernel.start)


def record(call: Callable[[], None], times: int) -> list[Kernel]:
    """What ``times`` calls run on the GPU, after one that is not counted."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(times):
            call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return read_trace(json.loads(path.read_text(encoding="utf-8")))


def wall_and_idle(kernels: list[Kernel]) -> tuple[float, float]:
    """Microseconds from the first start to the last end, and how many of them nothing ran."""
    idle, end = 0.0, kernels[0].start
    for kernel in kernels:
        idle += max(kernel.start - end, 0.0)
        end = max(end, kernel.start + kernel.us)
    return end - kernels[0].start, idle


def with_roles(step: list[Kernel], tokens: int) -> list[tuple[str, Kernel]]:
    """Each kernel of ``tokens`` steps of the model, with choices behind them or without, and its role; a step's last
    product is the head's."""
    roles = [role_of(kernel.name) for kernel in step]
    each, rest = divmod(len(step), tokens)
    if not rest:
        for start in range(0, len(step), each or 1):
            products = [i for i in range(start, start + each) if roles[i] == PRODUCT]
            for i in reversed(products):
                roles[i] = HEAD
                # cuBLAS may take two kernels for a product: its parts, and their sum.
                if i - 1 not in products or any("hf_fastpath" in step[part].name for part in (i - 1, i)):
                    break
    return list(zip(roles, step, strict=True))


def by_kernel(found: Iterable[tuple[str, Kernel]], tokens: int) -> list[Row]:
    """Rows of the CSV (role, kernel, grid, nodes, us, share), those that take longest first."""
    sums: dict[tuple[str, str, str], list[float]] = {}
    for role, kernel in found:
        key = role, short_name(kernel.name), "x".join(map(str, kernel.grid))
        sums.setdefault(key, []).append(kernel.us)
    total = sum(map(sum, sums.values()))
    rows = [
        {
            **{"role": role, "kernel": name, "grid": grid, "nodes": round(len(times) / tokens, 2)},
            **{"us": round(sum(times) / tokens, 2), "share": round(sum(times) / total, 4)},
        }
        for (role, name, grid), times in sums.items()
    ]
    return sorted(rows, key=lambda row: -row["us"])


def profile(replay: Replay) -> list[Row]:
    """The rows of one model at one batch size, without the columns that say which.

    Raises:
        ValueError: the slot has no room for the steps that are replayed.
    """
    tokens = min(TOKENS, replay.room // 3 - 1)  # some room is left
    if tokens < 1:
        raise ValueError(f"a profile needs room for {3 * 2} tokens, and there is room for {replay.room}")
    step = record(replay.step, tokens)
    choice = [] if replay.choice is None else record(replay.choice, tokens)
    return rows_of(step, choice, record(replay.token, tokens), tokens)


def rows_of(step: list[Kernel], choice: list[Kernel], both: list[Kernel], tokens: int) -> list[Row]:
    """:func:`profile` of what was recorded: of the model's steps; of the choices, if they are in graphs of their own;
    of both in turn."""
    if not step or not both:
        raise ValueError(NOTHING_SEEN)
    found = by_kernel([*with_roles(step, tokens), *((CHOICE, kernel) for kernel in choice)], tokens)
    return _with_totals(found, TOKEN, both, tokens)


def profile_prompt(prompt: Callable[[], None]) -> list[Row]:
    """As :func:`profile`, of a call that reads a prompt."""
    return rows_of_prompts([record(prompt, 1) for _ in range(PROMPTS)])


def rows_of_prompts(runs: list[list[Kernel]]) -> list[Row]:
    """:func:`profile_prompt` of what was recorded of each run."""
    if not all(runs):
        raise ValueError(NOTHING_SEEN)
    kernels = sorted(runs, key=wall_and_idle)[len(runs) // 2]
    return _with_totals(by_kernel(with_roles(kernels, 1), 1), PROMPT, kernels, 1)


def _with_totals(found: list[Row], phase: str, kernels: list[Kernel], times: int) -> list[Row]:
    """Rows of one profile, with what they have in common; kernels: those of ``times`` tokens or prompts in turn."""
    wall, idle = wall_and_idle(kernels)
    totals = {
        "phase": phase,
        "nodes_total": round(sum(row["nodes"] for row in found), 1),
        "sum_us": round(sum(row["us"] for row in found), 1),
        "wall_us": round(wall / times, 1),
        "idle_us": round(idle / times, 1),
    }
    return [row | totals for row in found]


def show(rows: list[Row], console: Console) -> None:
    """Prints the roles of one profile; products kernel by kernel."""
    first = rows[0]
    out = Table(box=box.SIMPLE_HEAD)
    for name in ("role", "nodes", "us", "%"):
        out.add_column(name, justify="left" if name == "role" else "right", overflow="fold")
    for role, parts in roles(rows).items():
        out.add_row(role, *_cells(parts))
        if role == PRODUCT and len(parts) > 1:
            for part in parts:
                out.add_row(f"  {part['kernel']}, {part['grid']} CTAs", *_cells([part]), style="dim")
    out.add_row("all", *_cells(rows))
    what = "One token" if first["phase"] == TOKEN else f"The first token, {first['prompt']} of prompt,"
    title = f"{what} of {first['model']}, {first['variant']}, {first['batch']} row(s), {first['choice']}:"
    console.print(title, out, highlight=False)
    times = f"{first['wall_us']} us a {first['phase']}, of which {first['idle_us']} us no kernel runs"
    console.print(f"{times}; {OVERLAP}." if first["phase"] == TOKEN else f"{times}.", highlight=False)


def roles(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows by role, what takes longest first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["role"], []).append(row)
    return dict(sorted(found.items(), key=lambda item: -sum(float(row["us"]) for row in item[1])))


def _cells(rows: list[Row]) -> list[str]:
    nodes, us, share = (sum(float(row[name]) for row in rows) for name in ("nodes", "us", "share"))
    return [f"{nodes:g}", f"{us:.1f}", f"{share:.0%}"]


def write(rows: list[Row], path: Path) -> None:
    """Writes a CSV file of the columns above."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
