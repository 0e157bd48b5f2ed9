"""``hf-fastpath bench gemm``: the int4 product against 16-bit weights and tinygemm, on this machine.

On a GPU each measurement is a CUDA graph whose calls read different weights, many times the L2 in all; on the CPU the
calls are timed one by one. One row of the CSV is one implementation at one size; columns:

impl          hf_fastpath_int4 (what a patched layer runs), tinygemm_int4 (torch's, GPU only), torch_16bit (cuBLAS, or
              torch's CPU product)
m, k, n       rows of x, in and out features; group_size, dtype
variant       which of our kernels it was
bytes         what one call must move: each input read once, each output written once
us_p20, us_p50, us_p80   microseconds a call
gb_s          bytes over us_p50
copy_gb_s     rate of a large copy, bytes read plus written, in the same run: what memory-bound code can reach
device, torch, commit
"""

from __future__ import annotations

import csv
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from hf_fastpath import heuristics, info
from hf_fastpath.eval import bench_ops
from hf_fastpath.modules import W4A16Linear
from hf_fastpath.packing import GROUP_SIZES
from hf_fastpath.runtime import require_device

COLUMNS = (
    *("impl", "m", "k", "n", "group_size", "dtype", "variant", "bytes", "us_p20", "us_p50", "us_p80"),
    *("gb_s", "copy_gb_s", "device", "torch", "commit"),
)
OURS, TINYGEMM, PLAIN = "hf_fastpath_int4", "tinygemm_int4", "torch_16bit"
ROWS = (1, 2, 4, 8, 16, 32, 64)
_CPU_SECONDS = 0.2  # a measurement; at least five calls
_CPU_COPY_BYTES = 400_000_000
_CPU_ROTATE_BYTES = 100_000_000

Call = Callable[[], Any]
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What to measure. shapes: (in features, out features).

    Raises:
        ValueError: a size that the packed layout does not take.
    """

    shapes: tuple[tuple[int, int], ...]
    rows: tuple[int, ...] = ROWS
    group_size: int = GROUP_SIZES[0]
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group size {self.group_size}: allowed are {', '.join(map(str, GROUP_SIZES))}")
        for k, n in self.shapes:
            if k < 1 or n < 1 or k % self.group_size:
                raise ValueError(
                    f"shape {k}x{n}: in features must be a multiple of the group size {self.group_size}; "
                    f"allowed are {', '.join(map(str, GROUP_SIZES))}"
                )
        if not isinstance(self.dtype, torch.dtype):
            raise ValueError("dtype auto: a benchmark needs bf16, fp16 or fp32")
        if not self.rows or min(self.rows) < 1:
            raise ValueError(f"rows {self.rows}: allowed are 1 and more")


def random_layer(k: int, n: int, sizes: Sizes, device: torch.device) -> W4A16Linear:
    """A symmetric int4 layer of random codes."""
    layer = W4A16Linear.empty(k, n, sizes.group_size, zeros=False, bias=False, dtype=sizes.dtype)
    layer.qweight = torch.randint(-(2**31), 2**31, layer.qweight.shape, dtype=torch.int32, device=device)
    layer.scales = torch.rand(layer.scales.shape, device=device).to(sizes.dtype) / 64
    return layer


def implementations(x: torch.Tensor, n: int, sizes: Sizes) -> Iterator[tuple[str, int, Callable[[], Call]]]:
    """(name, bytes of weights, what builds a call with weights of its own) of each implementation for these sizes."""
    k, device = x.shape[1], x.device
    groups = n * k // sizes.group_size

    def ours() -> Call:
        layer = random_layer(k, n, sizes, device)
        return lambda: layer(x)

    def tinygemm() -> Call:
        codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device)
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        scales = torch.rand(k // sizes.group_size, n, 2, device=device).to(sizes.dtype)
        return lambda: torch.ops.aten._weight_int4pack_mm(x, packed, sizes.group_size, scales)

    def plain() -> Call:
        weight = torch.randn(n, k, device=device).to(sizes.dtype)
        return lambda: F.linear(x, weight)

    yield OURS, n * k // 2 + 2 * groups, ours
    if device.type == "cuda" and sizes.dtype is torch.bfloat16 and k % 128 == 0 and n % 8 == 0:
        yield TINYGEMM, n * k // 2 + 4 * groups, tinygemm
    yield PLAIN, 2 * n * k, plain


def microseconds(calls: list[Call], device: torch.device) -> list[float]:
    """Times of the calls, in turn; on a GPU the mean of a graph of all of them, often."""
    if device.type == "cuda":
        return bench_ops.measure(calls)
    times: list[float] = []
    for call in calls:
        call()  # a packed layer takes its CPU layout at its first use
    stop = time.perf_counter() + _CPU_SECONDS
    while time.perf_counter() < stop or len(times) < 5:
        start = time.perf_counter()
        calls[len(times) % len(calls)]()
        times.append((time.perf_counter() - start) * 1e6)
    return times


def rotate_bytes(device: torch.device) -> int:
    """How much the calls of one measurement read, so that none finds its weights in a cache."""
    return bench_ops.ROTATE_BYTES if device.type == "cuda" else _CPU_ROTATE_BYTES


def copy_rate(device: torch.device) -> float:
    """GB/s of a large copy, bytes read plus bytes written."""
    if device.type == "cuda":
        return bench_ops.copy_rate()
    source = torch.ones(_CPU_COPY_BYTES // 4)
    target = torch.empty_like(source)
    return 2 * _CPU_COPY_BYTES / statistics.median(microseconds([lambda: target.copy_(source)], device)) / 1000


def measure(sizes: Sizes, device: torch.device, step: Callable[[], None] = lambda: None) -> Iterator[Row]:
    """One row of the CSV after the other, without the machine's columns. ``step`` is called once a size.

    Raises:
        Unsupported: the kernels cannot run on this GPU.
    """
    require_device(device)
    for k, n in sizes.shapes:
        for m in sizes.rows:
            x = torch.randn(m, k, device=device).to(sizes.dtype)
            for impl, weight_bytes, make in implementations(x, n, sizes):
                moved = weight_bytes + 2 * m * (k + n)
                calls = [make() for _ in range(max(2, math.ceil(rotate_bytes(device) / moved)))]
                timing = bench_ops.percentiles(microseconds(calls, device))
                variant = _chosen(device, m) if impl == OURS else ""
                size = {"m": m, "k": k, "n": n, "group_size": sizes.group_size, "dtype": str(sizes.dtype)[6:]}
                timing["gb_s"] = round(moved / timing["us_p50"] / 1000, 1)
                yield {"impl": impl, **size, "variant": variant, "bytes": moved, **timing}
            step()


def _chosen(device: torch.device, rows: int) -> str:
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return heuristics.w4a16_variant(device.type, rows, capability=capability).value


def table(rows: list[Row], copy_gb_s: float) -> Table:
    """One line a size: our time, its share of the copy rate, the others' times and how many times ours they are."""
    out = Table(title="int4 product, microseconds a call", box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("in x out", "rows", "hf_fastpath", "of copy rate", "torch 16-bit", "tinygemm"):
        out.add_column(name, justify="left" if name == "in x out" else "right")
    sizes: dict[tuple[int, int, int], dict[str, Row]] = {}
    for row in rows:
        sizes.setdefault((row["k"], row["n"], row["m"]), {})[row["impl"]] = row
    for (k, n, m), found in sizes.items():
        ours = found[OURS]
        others = [_against(found.get(impl), ours) for impl in (PLAIN, TINYGEMM)]
        out.add_row(f"{k} x {n}", str(m), f"{ours['us_p50']:.1f}", f"{ours['gb_s'] / copy_gb_s:.0%}", *others)
    return out


def _against(row: Row | None, ours: Row) -> str:
    return f"{row['us_p50']:.1f} ({row['us_p50'] / ours['us_p50']:.1f}x)" if row else ""


def read_csv(path: Path) -> list[Row]:
    """Rows that :func:`report` wrote.

    Raises:
        ValueError: it is no such file.
    """
    try:
        with path.open(newline="") as file:
            rows: list[Row] = list(csv.DictReader(file))
        return [row | {name: float(row[name]) for name in ("us_p50", "gb_s", "copy_gb_s")} for row in rows]
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: not a CSV of `hf-fastpath bench gemm` ({error})") from None


def run(
    sizes: Sizes, device: torch.device, console: Console, out: Path | None = None, plot: Path | None = None
) -> None:
    """Measures, prints the table, and writes the CSV and the plot that were asked for."""
    if plot:
        from hf_fastpath.eval import plots  # says before the work that matplotlib is missing
    torch.manual_seed(0)
    rows: list[Row] = []
    with Progress(console=console) as progress, torch.inference_mode():
        task = progress.add_task("Measuring", total=len(sizes.shapes) * len(sizes.rows))
        rate = copy_rate(device)
        for row in measure(sizes, device, lambda: progress.advance(task)):
            rows.append(row)
    console.print(table(rows, rate))
    rows = report(rows, COLUMNS, rate, device, console, out)
    if plot:
        plots.bandwidth_over_rows(rows, plot)
        console.print(f"Plot: {plot}")


def report(
    rows: list[Row], columns: tuple[str, ...], rate: float, device: torch.device, console: Console, out: Path | None
) -> list[Row]:
    """The rows with the machine's columns, which are printed too; written to ``out`` where that is given."""
    machine = {
        "copy_gb_s": round(rate, 1),
        "device": info.device_name(device),
        "torch": torch.__version__,
        "commit": bench_ops.commit_of(Path(__file__).parent),
    }
    console.print(f"{machine['device']}, torch {torch.__version__}; a large copy runs at {rate:,.0f} GB/s here")
    rows = [row | machine for row in rows]
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        console.print(f"Numbers: {out}")
    return rows
