"""Times the products of plain 16-bit weights on a GPU against cuBLAS: ``python -m hf_fastpath.eval.bench_linear16``.

Each measurement is a CUDA graph of calls on different weights, several times the L2 in all (see bench_ops). Columns of
the CSV, one row a measurement:

op            linear; swiglu, with the norm before it and gate and up together; head, with the norm before it and logits
              in float32
impl          hf_fastpath; torch: cuBLAS, and transformers' operations beside it
m, k, n       rows of x, in and out features (of swiglu those of gate and up together)
bytes, us_p20, us_p50, us_p80, gb_s, limit_us, copy_gb_s, gpu, torch, commit   as in bench_ops
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from hf_fastpath.eval.bench_ops import COLUMNS, Call, Row, bf16, result, write_rows
from hf_fastpath.eval.sizes import parse_rows
from hf_fastpath.ops import linear_16bit, linear_16bit_swiglu, rms_norm
from hf_fastpath.ops._rms_norm import rms_norm as torchs_rms_norm

EPS = 1e-5
ROWS = (1, 4, 8, 16)
# (in features, out features) of Llama-3.1-8B and LFM2.
LINEAR = [(4096, 6144), (4096, 4096), (14336, 4096), (2048, 6144), (2048, 2048), (7168, 2048)]
SWIGLU = [(4096, 28672), (2048, 14336)]
HEADS = [(4096, 128256), (2048, 128000)]


def linear_call(x: torch.Tensor, n: int, ours: bool) -> Call:
    w = bf16(n, x.shape[1])
    return (lambda: linear_16bit(x, w, None, None, 0.0, None)) if ours else (lambda: F.linear(x, w))


def swiglu_call(x: torch.Tensor, n: int, ours: bool) -> Call:
    w, norm = bf16(n, x.shape[1]), bf16(x.shape[1])
    if ours:
        return lambda: linear_16bit_swiglu(x, w, None, norm, EPS)

    def torchs() -> torch.Tensor:
        gate, up = F.linear(torchs_rms_norm(x, norm, EPS), w).chunk(2, dim=-1)
        return F.silu(gate) * up

    return torchs


def head_call(x: torch.Tensor, n: int, ours: bool) -> Call:
    w, norm = bf16(n, x.shape[1]), bf16(x.shape[1])
    if ours:
        return lambda: linear_16bit(rms_norm(x, norm, EPS), w, None, None, 0.0, None, float32_out=True)
    return lambda: F.linear(torchs_rms_norm(x, norm, EPS), w).float()


PARTS = {"linear": (LINEAR + SWIGLU + HEADS, linear_call), "swiglu": (SWIGLU, swiglu_call), "head": (HEADS, head_call)}


def rows_of(op: str, numbers: tuple[int, ...]) -> Iterator[Row]:
    """One row of the CSV after the other, without the machine's columns."""
    shapes, call = PARTS[op]
    for k, n in shapes:
        for m in numbers:
            x = bf16(m, k)
            out = {"linear": 2 * n, "swiglu": n, "head": 4 * n}[op]
            moved = 2 * n * k + m * (2 * k + out)
            for ours in (True, False):
                size = {"m": m, "k": k, "n": n}
                yield result(op, "hf_fastpath" if ours else "torch", size, moved, partial(call, x, n, ours))


def main() -> None:
    parser = argparse.ArgumentParser(description="Times products of 16-bit weights; see the top of the file.")
    parser.add_argument("--out", type=Path, required=True, help="the CSV file to write")
    parser.add_argument("--only", choices=PARTS, help="one of the ops (default: all)")
    parser.add_argument("--rows", type=parse_rows, default=ROWS, help="rows of x: 1,16 (default: 1,4,8,16)")
    parser.add_argument("--commit", help="the commit to name in every row (default: asked of git)")
    arguments = parser.parse_args()
    ops = [arguments.only] if arguments.only else PARTS

    def line(row: Row, rate: float) -> str:
        size = f"m={row['m']} k={row['k']} n={row['n']}"
        share = row["gb_s"] / rate
        return f"{row['op']:7} {row['impl']:12} {size:28} {row['us_p50']:9.2f} us, {share:4.0%}"

    with torch.inference_mode():
        write_rows(
            "bench_linear16",
            arguments,
            COLUMNS,
            lambda: (row for op in ops for row in rows_of(op, arguments.rows)),
            line,
        )


if __name__ == "__main__":
    main()
