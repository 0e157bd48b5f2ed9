"""Times the int4 products on a GPU against what torch has: ``python -m hf_fastpath.eval.bench_ops --out FILE``.

Each measurement captures a CUDA graph of enough calls on different inputs to read far more than the L2 holds, replays
it, and divides each replay's time by its calls. Columns of the CSV, one row a measurement:

op            linear (few rows), gemm, gemm_swiglu, short_conv or conv_projection
impl          linear: hf_fastpath_int4, tinygemm_int4, cublas_bf16; gemm: each variant of w4a16_gemm that the GPU runs,
              dequantize_cublas (the weight expanded to 16 bits in every call), cublas_bf16; short_conv: hf_fastpath,
              torch (the reference: a dozen operations), a step of m rows where k is 1, else m prompts of k tokens;
              gemm_swiglu, gate and up together, n of both, in each variant of w4a16_gemm that has it: one_op_...,
              two_ops_...; conv_projection, a step's norm, projection to B, C and x, and convolution: one_op, two_ops
m, k, n       rows of x, in and out features; of short_conv rows, tokens of each and channels
bytes         what one call must move: each input read once, each output written once
us_p20, us_p50, us_p80   microseconds a call, over the replays
gb_s          bytes over us_p50
limit_us      bytes over the rate of a large device copy, measured in the same run (copy_gb_s)
copy_gb_s, gpu, torch, commit
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
import statistics
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from hf_fastpath.build import load_library
from hf_fastpath.eval.sizes import parse_rows, parse_shapes
from hf_fastpath.heuristics import w4a16_gemm_runs_on, w4a16_gemm_swiglu_has
from hf_fastpath.ops import (
    short_conv_prefill,
    short_conv_step,
    swiglu,
    w4a16_dequantize,
    w4a16_gemm,
    w4a16_gemm_swiglu,
    w4a16_linear,
    w4a16_linear_fused,
    w4a16_short_conv,
)
from hf_fastpath.ops.w4a16_gemm import VARIANTS

COLUMNS = (
    *("op", "impl", "m", "k", "n", "bytes"),
    *("us_p20", "us_p50", "us_p80", "gb_s", "limit_us", "copy_gb_s", "gpu", "torch", "commit"),
)
LINEAR_SHAPES = [  # (K, N): the projections of Llama-3.1-8B and LFM2
    (4096, 28672),
    (4096, 14336),
    (14336, 4096),
    (4096, 6144),
    (4096, 4096),
    (2048, 14336),
    (2048, 6144),
    (2048, 2048),
]
LINEAR_ROWS = (1, 16)
GEMM_ROWS = (32, 64, 128, 512, 2048, 8192)
SWIGLU_ROWS = (24, 32, 48, 64)
CONV_SIZES = [(1, 1), (16, 1), (64, 1), (1, 512), (1, 8192), (16, 512)]  # rows, tokens of each
CONV_CHANNELS, CONV_TAPS = 2048, 3  # of LFM2
GROUP = 128
ROTATE_BYTES = 300_000_000  # five times the L2 of an H200
MAX_CALLS = 2000  # of a graph: below 150 KB a call some of the inputs are in the L2, as in a model they would be
REPLAYS = 60

Call = Callable[[], Any]
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What to measure of the products. rows: None for those of the op; impls: parts of names, empty for all."""

    rows: tuple[int, ...] | None = None
    shapes: tuple[tuple[int, int], ...] = tuple(LINEAR_SHAPES)
    impls: tuple[str, ...] = ()

    def has(self, impl: str) -> bool:
        return not self.impls or any(part in impl for part in self.impls)


def measure(calls: Sequence[Call]) -> list[float]:
    """Microseconds a call, one number for each replay of a graph of all calls."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls[0]()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return [time / len(calls) for time in time_each(graph.replay)]


def time_each(call: Call) -> list[float]:
    """Microseconds of each of many calls, after some that are not counted."""
    for _ in range(5):
        call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPLAYS)]
    for start, stop in events:
        start.record()
        call()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) * 1000 for start, stop in events]


def result(op: str, impl: str, size: Row, moved: int, make: Callable[[], Call]) -> Row:
    """Measures one implementation; ``make`` builds a call with inputs of its own."""
    calls = [make() for _ in range(min(MAX_CALLS, max(2, math.ceil(ROTATE_BYTES / moved))))]
    return {"op": op, "impl": impl, **size, "bytes": moved, **percentiles(measure(calls))}


def percentiles(times: list[float]) -> Row:
    """The columns us_p20, us_p50 and us_p80 of measured times in microseconds."""
    deciles = statistics.quantiles(times, n=10)
    return {f"us_p{10 * tenth}": round(deciles[tenth - 1], 3) for tenth in (2, 5, 8)}


def bf16(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def int4_weight(k: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    q = torch.randint(-(2**31), 2**31, (n // 16, k // 64, 32, 4), dtype=torch.int32, device="cuda")
    return q, torch.rand(n // 16, k // GROUP, 16, device="cuda").bfloat16()


def int4_call(x: torch.Tensor, k: int, n: int) -> Call:
    q, scales = int4_weight(k, n)
    return lambda: w4a16_linear(x, q, scales, None, None, n, GROUP)


def gemm_call(variant: int, x: torch.Tensor, k: int, n: int) -> Call:
    q, scales = int4_weight(k, n)
    return lambda: w4a16_gemm(x, q, scales, None, None, n, GROUP, variant)


def dequantize_call(x: torch.Tensor, k: int, n: int) -> Call:
    q, scales = int4_weight(k, n)
    return lambda: F.linear(x, w4a16_dequantize(q, scales, None, k, n, GROUP))


def tinygemm_call(x: torch.Tensor, k: int, n: int) -> Call:
    q = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    packed = torch.ops.aten._convert_weight_to_int4pack(q, 8)
    scales = bf16(k // GROUP, n, 2)
    return lambda: torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, scales)


def cublas_call(x: torch.Tensor, k: int, n: int) -> Call:
    w = bf16(n, k)
    return lambda: F.linear(x, w)


def linear_rows(wanted: Wanted) -> Iterator[Row]:
    for k, n in wanted.shapes:
        for m in wanted.rows or LINEAR_ROWS:
            x = bf16(m, k)
            size = {"m": m, "k": k, "n": n}
            ends = 2 * m * (k + n)
            groups = n * k // GROUP
            for impl, moved, make in (
                ("hf_fastpath_int4", n * k // 2 + 2 * groups, int4_call),
                ("tinygemm_int4", n * k // 2 + 4 * groups, tinygemm_call),
                ("cublas_bf16", 2 * n * k, cublas_call),
            ):
                if not wanted.has(impl):
                    continue
                yield result("linear", impl, size, moved + ends, lambda make=make, x=x, k=k, n=n: make(x, k, n))  # type: ignore[misc]


def gemm_rows(wanted: Wanted) -> Iterator[Row]:
    fitting = [i for i in range(len(VARIANTS)) if w4a16_gemm_runs_on(i, torch.cuda.get_device_capability())]
    for k, n in wanted.shapes:
        int4_bytes = n * k // 2 + 2 * (n * k // GROUP)
        impls: list[tuple[str, int, Callable[..., Call]]] = [
            (f"gemm_{VARIANTS[i].name}", int4_bytes, partial(gemm_call, i)) for i in fitting
        ]
        impls += [("dequantize_cublas", int4_bytes, dequantize_call), ("cublas_bf16", 2 * n * k, cublas_call)]
        for m in wanted.rows or GEMM_ROWS:
            x = bf16(m, k)
            for impl, moved, make in impls:
                if not wanted.has(impl):
                    continue
                yield result("gemm", impl, {"m": m, "k": k, "n": n}, moved + 2 * m * (k + n), partial(make, x, k, n))


def gemm_swiglu_call(variant: int, one_op: bool, x: torch.Tensor, k: int, n: int) -> Call:
    q, scales = int4_weight(k, n)
    if one_op:
        return lambda: w4a16_gemm_swiglu(x, q, scales, None, None, n // 2, GROUP, variant)
    return lambda: swiglu(w4a16_gemm(x, q, scales, None, None, n, GROUP, variant))


def gemm_swiglu_rows(wanted: Wanted) -> Iterator[Row]:
    capability = torch.cuda.get_device_capability()
    fitting = [i for i in range(len(VARIANTS)) if w4a16_gemm_swiglu_has(i) and w4a16_gemm_runs_on(i, capability)]
    for k, n in wanted.shapes:
        for m in wanted.rows or SWIGLU_ROWS:
            x, moved = bf16(m, k), n * k // 2 + 2 * (n * k // GROUP) + m * (2 * k + n)
            for variant in fitting:
                for name in ("one_op", "two_ops"):
                    impl = f"{name}_{VARIANTS[variant].name}"
                    if wanted.has(impl):
                        make = partial(gemm_swiglu_call, variant, name == "one_op", x, k, n)
                        yield result("gemm_swiglu", impl, {"m": m, "k": k, "n": n}, moved, make)


def short_conv_call(rows: int, tokens: int, reference: bool) -> Call:
    bcx, weight = bf16(rows, tokens, 3 * CONV_CHANNELS), bf16(CONV_CHANNELS, CONV_TAPS)
    state = bf16(rows, CONV_CHANNELS, CONV_TAPS)
    if tokens == 1:
        return lambda: short_conv_step(bcx[:, 0], state, weight, None, None, reference=reference)
    return lambda: short_conv_prefill(bcx, state, weight, None, None, reference=reference)


def short_conv_rows(wanted: Wanted) -> Iterator[Row]:
    for rows, tokens in CONV_SIZES:
        moved = 2 * CONV_CHANNELS * (rows * (4 * tokens + 2 * CONV_TAPS) + CONV_TAPS)
        for impl, reference in (("hf_fastpath", False), ("torch", True)):
            if wanted.has(impl):
                size = {"m": rows, "k": tokens, "n": CONV_CHANNELS}
                yield result("short_conv", impl, size, moved, partial(short_conv_call, rows, tokens, reference))


def conv_projection_call(x: torch.Tensor, one_op: bool) -> Call:
    k, rows = x.shape[1], 3 * CONV_CHANNELS
    (q, scales), norm, weight = int4_weight(k, rows), bf16(k), bf16(CONV_CHANNELS, CONV_TAPS)
    state = bf16(x.shape[0], CONV_CHANNELS, CONV_TAPS)
    if one_op:
        return lambda: w4a16_short_conv(x, q, scales, None, None, norm, 1e-5, state, weight, None, None, GROUP)

    def two_ops() -> torch.Tensor:
        bcx = w4a16_linear_fused(x, q, scales, None, None, norm, 1e-5, None, rows, GROUP)
        return short_conv_step(bcx, state, weight, None, None)

    return two_ops


def conv_projection_rows(wanted: Wanted) -> Iterator[Row]:
    k, n = CONV_CHANNELS, 3 * CONV_CHANNELS
    for m in wanted.rows or (1, 4, 16):
        moved = n * k // 2 + 2 * n * k // GROUP + 2 * CONV_CHANNELS * (m * (2 + 2 * CONV_TAPS) + 1 + CONV_TAPS)
        for impl in ("one_op", "two_ops"):
            if wanted.has(impl):
                make = partial(conv_projection_call, bf16(m, k), impl == "one_op")
                yield result("conv_projection", impl, {"m": m, "k": k, "n": n}, moved, make)


PARTS = {
    "conv_projection": conv_projection_rows,
    "short_conv": short_conv_rows,
    "linear": linear_rows,
    "gemm": gemm_rows,
    "gemm_swiglu": gemm_swiglu_rows,
}


def copy_rate() -> float:
    """GB/s of a large device copy, bytes read plus bytes written: what memory-bound code can reach.

    Not in a graph: there the copy is a node of the copy engine, which is slower than the kernel it is outside.
    """
    source = torch.randint(0, 256, (4_000_000_000,), dtype=torch.uint8, device="cuda").view(torch.float32)
    target = torch.empty_like(source)
    return 2 * 4_000_000_000 / statistics.median(time_each(lambda: target.copy_(source))) / 1000


def commit_of(folder: Path) -> str:
    """The commit of the checkout that ``folder`` belongs to, "unknown" outside one."""
    command = ["git", "-C", str(folder.resolve()), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def write_rows(
    name: str,
    arguments: argparse.Namespace,
    columns: Sequence[str],
    rows: Callable[[], Iterable[Row]],
    line: Callable[[Row, float], str],
) -> None:
    """Runs a benchmark and writes its CSV row by row, with rates, limit and machine beside what was measured.

    Args:
        name: the benchmark's, for messages.
        arguments: ``out``, the file, and ``commit`` or None.
        rows: measures, once kernels and random numbers are ready; rows have ``bytes`` and ``us_p50``.
        line: what is printed of a row, given the rate of a large copy in GB/s.
    """
    loaded = load_library()
    if not loaded.loaded:
        raise SystemExit(f"{name}: {loaded.reason}")
    torch.manual_seed(0)
    rate = copy_rate()
    machine = {
        "copy_gb_s": round(rate),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": arguments.commit or commit_of(Path(__file__).parent),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in rows():
            row["gb_s"] = round(row["bytes"] / row["us_p50"] / 1000)
            row["limit_us"] = round(row["bytes"] / rate / 1000, 2)
            writer.writerow(row | machine)
            print(line(row, rate), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the GPU ops; see the top of the file for the columns.")
    parser.add_argument("--out", type=Path, required=True, help="the CSV file to write")
    parser.add_argument("--only", choices=PARTS, help="one of the ops (default: all)")
    parser.add_argument("--rows", type=parse_rows, help="rows of x of the products: 512,2048 (default: each op's own)")
    parser.add_argument(
        "--shapes", type=parse_shapes, default=tuple(LINEAR_SHAPES), help="in x out features: 4096x28672,4096x4096"
    )
    parser.add_argument("--impls", default="", help="parts of implementations' names: prefill,cublas (default: all)")
    parser.add_argument("--commit", help="the commit to name in every row (default: asked of git)")
    arguments = parser.parse_args()
    wanted = Wanted(arguments.rows, arguments.shapes, tuple(part for part in arguments.impls.split(",") if part))
    parts = [PARTS[arguments.only]] if arguments.only else PARTS.values()

    def line(row: Row, rate: float) -> str:
        size = " ".join(f"{name}={row[name]}" for name in COLUMNS[2:5] if name in row)
        return f"{row['impl']:40} {size:40} {row['us_p50']:9.2f} us  limit {row['limit_us']:7.2f}"

    write_rows("bench_ops", arguments, COLUMNS, lambda: (row for part in parts for row in part(wanted)), line)


if __name__ == "__main__":
    main()
