"""``hf-fastpath bench attention``: decode attention over every cache format against torch's, on this machine.

One layer's attention of one new token a row. On a GPU each measurement is a CUDA graph whose calls read different
caches, many times the L2 in all; on the CPU the calls are timed one by one. One row of the CSV is one implementation at
one size; columns:

impl          sdpa (torch, over 16-bit keys and values), or the cache format that our kernel reads
batch, tokens, heads, kv_heads, dim, dtype   rows, tokens in the cache, sizes of the layer
budget        of h2o, the tokens that it keeps
bytes         what one call must read: keys, values and scales of the tokens that are there
us_p20, us_p50, us_p80   microseconds a call
gb_s          bytes over us_p50
copy_gb_s     rate of a large copy, bytes read plus written, in the same run: what memory-bound code can reach
device, torch, commit
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from hf_fastpath import ops
from hf_fastpath.caches import CompressedLayer, FastLayer
from hf_fastpath.config import KV_BUDGET, KVFormat
from hf_fastpath.eval import bench_gemm, bench_ops
from hf_fastpath.generation import CACHES
from hf_fastpath.runtime import require_device

COLUMNS = (
    *("impl", "batch", "tokens", "heads", "kv_heads", "dim", "dtype", "budget", "bytes"),
    *("us_p20", "us_p50", "us_p80", "gb_s", "copy_gb_s", "device", "torch", "commit"),
)
SDPA = "sdpa"
FORMATS = tuple(kv_format.value for kv_format in CACHES)
CHUNK = 4096  # tokens that are appended at a time

Call = Callable[[], Any]
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What to measure.

    Raises:
        ValueError: the heads do not fit together, or a number is not positive.
    """

    batches: tuple[int, ...] = (1, 8)
    tokens: tuple[int, ...] = (1024, 4096, 32768)
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    budget: int = KV_BUDGET

    def __post_init__(self) -> None:
        for name in ("batches", "tokens"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: allowed are 1 and more")
        if self.kv_heads < 1 or self.heads < 1 or self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads}: must be a multiple of kv_heads {self.kv_heads}")
        if self.dim < 2 or self.budget < 1:
            raise ValueError(f"dim {self.dim}, budget {self.budget}: must be positive")
        if not isinstance(self.dtype, torch.dtype):
            raise ValueError("dtype auto: a benchmark needs bf16, fp16 or fp32")


def filled_layer(impl: str, batch: int, tokens: int, sizes: Sizes, device: torch.device) -> FastLayer:
    """A cache layer of a format with random tokens; h2o keeps its budget of them."""
    kind: Any = CACHES[KVFormat(impl)].layer_class
    shape = (batch, sizes.kv_heads, sizes.dim)

    def random(count: int) -> torch.Tensor:
        return torch.randn(shape[0], shape[1], count, shape[2], device=device).to(sizes.dtype)

    if impl == KVFormat.H2O.value:
        count = min(tokens, sizes.budget)
        layer = kind(budget=sizes.budget, window=sizes.budget // 2)
        layer.update(random(count), random(count))
        query = torch.randn(batch, sizes.heads, count, sizes.dim, device=device).to(sizes.dtype)
        layer.attend(query, None, sizes.dim**-0.5)
        return layer
    layer = kind(tokens)
    for start in range(0, tokens, CHUNK):
        count = min(CHUNK, tokens - start)
        layer.update(random(count), random(count))
    return layer


def bytes_read(layer: FastLayer, tokens: int) -> int:
    """Of what a layer stores, the part that holds tokens."""
    total = 0.0
    for tensor, each in zip(layer.storage, layer.tokens_per_entry, strict=True):
        share = min(tokens / (tensor.shape[2] * each), 1.0) if each else 1.0
        total += tensor.nbytes * share
    return round(total)


def implementation(
    impl: str, batch: int, tokens: int, sizes: Sizes, device: torch.device
) -> tuple[int, Callable[[], Call]]:
    """The bytes that a call must read, and what builds a call with a cache of its own."""
    query = torch.randn(batch, sizes.heads, sizes.dim, device=device).to(sizes.dtype)
    scaling = sizes.dim**-0.5
    if impl == SDPA:
        shape = (batch, sizes.kv_heads, tokens, sizes.dim)

        def sdpa() -> Call:
            k, v = (torch.randn(shape, device=device).to(sizes.dtype) for _ in range(2))
            return lambda: F.scaled_dot_product_attention(query.unsqueeze(2), k, v, scale=scaling, enable_gqa=True)

        return 2 * math.prod(shape) * sizes.dtype.itemsize, sdpa
    layer = filled_layer(impl, batch, tokens, sizes, device)
    attend: Any = getattr(ops, f"attn_decode_{impl}")

    def ours() -> Call:
        storage = [tensor.clone() for tensor in layer.storage]
        tickets = torch.zeros(batch * sizes.kv_heads, dtype=torch.int32, device=device)
        return lambda: attend(query, storage, None, scaling, tickets=tickets)

    return bytes_read(layer, tokens), ours


def why_not(impl: str, sizes: Sizes, device: torch.device) -> str:
    """Why a format cannot be measured here; "" when it can."""
    if impl == SDPA or device.type != "cuda":
        return ""
    kind: Any = CACHES[KVFormat(impl)].layer_class
    layer = kind(budget=sizes.budget) if impl == KVFormat.H2O.value else kind()
    return layer.why_no_kernel(sizes.dim) if isinstance(layer, CompressedLayer) else ""


def measure(sizes: Sizes, device: torch.device, step: Callable[[], None] = lambda: None) -> Iterator[Row]:
    """One row of the CSV after the other, without the machine's columns. ``step`` is called once a size.

    Raises:
        Unsupported: the kernels cannot run on this GPU.
    """
    require_device(device)
    for batch in sizes.batches:
        for tokens in sizes.tokens:
            for impl in (SDPA, *FORMATS):
                if why_not(impl, sizes, device):
                    continue
                moved, make = implementation(impl, batch, tokens, sizes, device)
                calls = [make() for _ in range(max(2, math.ceil(bench_gemm.rotate_bytes(device) / moved)))]
                timing = bench_ops.percentiles(bench_gemm.microseconds(calls, device))
                timing["gb_s"] = round(moved / timing["us_p50"] / 1000, 1)
                yield {
                    **{"impl": impl, "batch": batch, "tokens": tokens, "heads": sizes.heads},
                    **{"kv_heads": sizes.kv_heads, "dim": sizes.dim, "dtype": str(sizes.dtype)[6:], "bytes": moved},
                    "budget": sizes.budget if impl == KVFormat.H2O.value else "",
                    **timing,
                }
            step()


def table(rows: list[Row]) -> Table:
    """One line a size: torch's time, and each format's with how many times faster it is."""
    out = Table(title="Decode attention of one layer, microseconds a call", box=box.SIMPLE_HEAD, title_justify="left")
    impls = list(dict.fromkeys(row["impl"] for row in rows))
    for name in ("rows", "tokens", *impls):
        out.add_column(name, justify="right")
    sizes: dict[tuple[int, int], dict[str, Row]] = {}
    for row in rows:
        sizes.setdefault((row["batch"], row["tokens"]), {})[row["impl"]] = row
    for (batch, tokens), found in sizes.items():
        base = found[SDPA]["us_p50"]
        cells = [f"{found[i]['us_p50']:.1f} ({base / found[i]['us_p50']:.1f}x)" for i in impls if i != SDPA]
        out.add_row(str(batch), f"{tokens:,}", f"{base:.1f}", *cells)
    return out


def run(
    sizes: Sizes, device: torch.device, console: Console, out: Path | None = None, plot: Path | None = None
) -> None:
    """Measures, prints the table, and writes the CSV and the plot that were asked for."""
    if plot:
        from hf_fastpath.eval import plots  # says before the work that matplotlib is missing
    torch.manual_seed(0)
    for impl in FORMATS:
        if reason := why_not(impl, sizes, device):
            console.print(f"Not measured: {reason}")
    rows: list[Row] = []
    with Progress(console=console) as progress, torch.inference_mode():
        task = progress.add_task("Measuring", total=len(sizes.batches) * len(sizes.tokens))
        rate = bench_gemm.copy_rate(device)
        for row in measure(sizes, device, lambda: progress.advance(task)):
            rows.append(row)
    console.print(table(rows))
    rows = bench_gemm.report(rows, COLUMNS, rate, device, console, out)
    if plot:
        plots.attention_over_tokens(rows, plot)
        console.print(f"Plot: {plot}")
