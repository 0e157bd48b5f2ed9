"""Times a mixture of 16-bit experts on a GPU: ``python -m hf_fastpath.eval.bench_moe16 --out FILE``.

The layer of eval/bench_moe.py, its experts in bf16, measured and written down as there: the columns are the same. impl
is hf_fastpath, our op, or grouped_mm, what prompts run: torch's products over sorted rows.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from hf_fastpath.eval.bench_moe import COLUMNS, EXPERTS, HIDDEN, INNER, TOP_K, Row, expert_bytes
from hf_fastpath.eval.bench_ops import ROTATE_BYTES, bf16, measure, percentiles, write_rows
from hf_fastpath.eval.sizes import parse_rows
from hf_fastpath.modules.experts16 import grouped_experts
from hf_fastpath.ops import moe_experts_16bit

ROWS = (1, 2, 4, 8, 16, 32, 64, 512)
IMPLS = {"hf_fastpath": moe_experts_16bit, "grouped_mm": grouped_experts}


def rows_of(rows: int, layers: list[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[Row]:
    """layers: weights, of which a graph takes as many as are far more than the L2 holds."""
    x, shares = bf16(rows, HIDDEN), torch.rand(rows, TOP_K, device="cuda").bfloat16()
    experts = torch.rand(rows, EXPERTS, device="cuda").topk(TOP_K).indices
    chosen = int(experts.unique().numel())
    moved = chosen * expert_bytes(16) + 4 * rows * HIDDEN
    used = layers[: max(2, math.ceil(ROTATE_BYTES / moved))]
    for name, run in IMPLS.items():
        calls = [partial(run, x, experts, shares, *weights) for weights in used]
        times = percentiles(measure(calls))
        yield {"part": "experts", "impl": name, "rows": rows, "chosen": chosen, "bytes": moved, **times}


def main() -> None:
    parser = argparse.ArgumentParser(description="Times a mixture of 16-bit experts; see the top of the file.")
    parser.add_argument("--out", type=Path, required=True, help="the CSV file to write")
    parser.add_argument("--rows", type=parse_rows, default=ROWS, help="rows of x: 1,16,512")
    parser.add_argument("--commit", help="the commit to name in every row (default: asked of git)")
    arguments = parser.parse_args()

    def rows() -> Iterator[Row]:
        count = math.ceil(ROTATE_BYTES / (TOP_K * expert_bytes(16)))
        layers = [(bf16(EXPERTS, 2 * INNER, HIDDEN) / 45, bf16(EXPERTS, HIDDEN, INNER) / 42) for _ in range(count)]
        for number in arguments.rows:
            yield from rows_of(number, layers)

    def line(row: Row, rate: float) -> str:
        name = f"{row['impl']:12}rows={row['rows']:<6}chosen={row['chosen']:<4}"
        return f"{name}{row['us_p50']:9.2f} us  limit {row['limit_us']:7.2f}  {row['gb_s']} GB/s"

    write_rows("bench_moe16", arguments, COLUMNS, rows, line)


if __name__ == "__main__":
    main()
