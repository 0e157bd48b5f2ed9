"""Times a mixture of int4 experts on a GPU: ``python -m hf_fastpath.eval.bench_moe --out FILE``.

As eval/bench_ops.py does: a CUDA graph of enough calls on different weights to read far more than the L2 holds. The
layer is LFM2.5-8B-A1B's; a row's experts are drawn evenly. Columns, beside bench_ops's times, rates and machine:

part     layer (norm, router, experts and residual, as a decoder layer of the model runs them), router (norm and
         router), experts (and residual)
impl     hf_fastpath: the variant that heuristics.py takes; hf_fastpath_apart: with norm and residual by torch, as
         modules do them; hf_fastpath_*: each variant of moe_experts that the GPU runs; grouped_mm_bf16: torch's
         products over sorted rows, the weights in bf16; dequantize_cublas: each chosen expert expanded to 16 bits, then
         cuBLAS, which asks the GPU which they are and so is timed without a graph
rows     of x
chosen   experts that at least one row was sent to
bytes    what one call must move: the chosen experts' weights once, x and y
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from hf_fastpath.eval.bench_ops import ROTATE_BYTES, measure, percentiles, time_each, write_rows
from hf_fastpath.eval.sizes import parse_rows
from hf_fastpath.heuristics import moe_experts_runs_on, moe_experts_variant
from hf_fastpath.ops import moe_experts, moe_norm_router, moe_router, w4a16_dequantize
from hf_fastpath.ops._rms_norm import rms_norm
from hf_fastpath.ops.moe_experts import VARIANTS, expert_by_expert

COLUMNS = (
    *("part", "impl", "rows", "chosen", "bytes"),
    *("us_p20", "us_p50", "us_p80", "gb_s", "limit_us", "copy_gb_s", "gpu", "torch", "commit"),
)
HIDDEN, INNER, EXPERTS, TOP_K, GROUP = 2048, 1792, 32, 4, 128
EPS = 1e-5
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192)

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Layer:
    """Random weights of one layer on the GPU, and inputs."""

    x: torch.Tensor
    norm: torch.Tensor
    gate: torch.Tensor
    bias: torch.Tensor
    packed: tuple[Any, ...]  # qweight, scales, zeros of gate_up, then of down

    @classmethod
    def random(cls, x: torch.Tensor) -> Layer:
        def stack(n: int, k: int) -> tuple[Any, ...]:
            words = torch.randint(-(2**31), 2**31, (EXPERTS, n // 16, k // 64, 32, 4), dtype=torch.int32, device="cuda")
            groups = (EXPERTS, n // 16, k // GROUP, 16)
            zeros = torch.randint(0, 16, groups, dtype=torch.uint8, device="cuda")
            return words, (torch.rand(groups, device="cuda") / 100).bfloat16(), zeros

        gate = (torch.randn(EXPERTS, HIDDEN, device="cuda") / HIDDEN**0.5).bfloat16()
        packed = (*stack(2 * INNER, HIDDEN), *stack(HIDDEN, INNER))
        norm = torch.ones(HIDDEN, device="cuda").bfloat16()
        return cls(x, norm, gate, torch.zeros(EXPERTS, device="cuda"), packed)

    def route(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x's norm, experts and shares."""
        x, shares, experts = moe_norm_router(self.x, self.norm, EPS, self.gate, self.bias, TOP_K, True, 1.0)
        return x, experts, shares

    def mix(
        self,
        x: torch.Tensor,
        experts: torch.Tensor,
        shares: torch.Tensor,
        variant: int,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        q, scales, zeros, down_q, down_scales, down_zeros = self.packed
        packed = (q, scales, zeros, down_q, down_scales, down_zeros)
        return moe_experts(x, experts, shares, *packed, INNER, GROUP, GROUP, variant, residual)

    def whole(self, variant: int) -> torch.Tensor:
        return self.mix(*self.route(), variant, self.x)

    def apart(self, variant: int) -> torch.Tensor:
        """The same as modules do it."""
        x = rms_norm(self.x, self.norm, EPS)
        _, shares, experts = moe_router(x, self.gate, self.bias, TOP_K, True, 1.0)
        return self.x + self.mix(x, experts, shares, variant)

    def dequantize(self, experts: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        up, down = self.packed[:3], self.packed[3:]
        return expert_by_expert(
            self.x,
            experts,
            shares,
            lambda e: w4a16_dequantize(up[0][e], up[1][e], up[2][e], HIDDEN, 2 * INNER, GROUP),
            lambda e: w4a16_dequantize(down[0][e], down[1][e], down[2][e], INNER, HIDDEN, GROUP),
        )


def grouped_mm(x: torch.Tensor, experts: torch.Tensor, shares: torch.Tensor) -> Callable[[], Any]:
    """The mixture in bf16 by torch's grouped product, with weights of its own: what a stock model with sorted rows
    does."""
    gate_up = torch.randn(EXPERTS, 2 * INNER, HIDDEN, device="cuda", dtype=torch.bfloat16)
    down = torch.randn(EXPERTS, HIDDEN, INNER, device="cuda", dtype=torch.bfloat16)
    numbers = torch.arange(EXPERTS, device="cuda")

    def call() -> torch.Tensor:
        flat = experts.flatten()
        order = flat.argsort()
        ends = (flat.unsqueeze(1) == numbers).sum(0).cumsum(0).to(torch.int32)  # bincount asks the GPU for its size
        both = torch._grouped_mm(x[order // TOP_K], gate_up.transpose(1, 2), offs=ends)
        gate, up = both.chunk(2, dim=-1)
        product = torch._grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
        product = torch.empty_like(product).index_copy_(0, order, product).view(*experts.shape, -1)
        return (product * shares.unsqueeze(-1)).sum(1)

    return call


def expert_bytes(weight_bits: float) -> int:
    return int(3 * HIDDEN * INNER * weight_bits / 8)


def rows_of(rows: int, impls: tuple[str, ...]) -> Iterator[Row]:
    def has(name: str) -> bool:
        return not impls or any(part in name for part in impls)

    capability = torch.cuda.get_device_capability()
    x = torch.randn(rows, HIDDEN, device="cuda").bfloat16()
    layers = [Layer.random(x)]
    normalized, experts, shares = layers[0].route()
    chosen = int(experts.unique().numel())
    ends = 4 * rows * HIDDEN
    moved = chosen * expert_bytes(4 + (16 + 8) / GROUP) + ends
    # An expert that nobody chose is no weight that a call brings into the L2.
    layers += [Layer.random(x) for _ in range(max(1, math.ceil(ROTATE_BYTES / moved) - 1))]
    gate_bytes = 2 * EXPERTS * HIDDEN

    def row(part: str, impl: str, size: int, times: list[float]) -> Row:
        return {"part": part, "impl": impl, "rows": rows, "chosen": chosen, "bytes": size, **percentiles(times)}

    best = moe_experts_variant(rows, TOP_K, EXPERTS, capability)
    if has("hf_fastpath"):
        yield row("layer", "hf_fastpath", moved + gate_bytes, measure([partial(one.whole, best) for one in layers]))
        yield row("router", "hf_fastpath", gate_bytes + ends // 2, measure([one.route for one in layers]))
    if has("hf_fastpath_apart"):
        times = measure([partial(one.apart, best) for one in layers])
        yield row("layer", "hf_fastpath_apart", moved + gate_bytes, times)
    for variant, form in enumerate(VARIANTS):
        if moe_experts_runs_on(variant, capability) and has(f"hf_fastpath_{form.name}"):
            calls = [partial(one.mix, normalized, experts, shares, variant, x) for one in layers]
            yield row("experts", f"hf_fastpath_{form.name}", moved, measure(calls))
    if has("dequantize_cublas"):
        yield row("experts", "dequantize_cublas", moved, time_each(partial(layers[0].dequantize, experts, shares)))
    del layers
    if has("grouped_mm_bf16"):
        size = chosen * expert_bytes(16) + ends
        products = [grouped_mm(x, experts, shares) for _ in range(max(2, math.ceil(ROTATE_BYTES / size)))]
        yield row("experts", "grouped_mm_bf16", size, measure(products))


def main() -> None:
    parser = argparse.ArgumentParser(description="Times a mixture of experts; see the top of the file for the columns.")
    parser.add_argument("--out", type=Path, required=True, help="the CSV file to write")
    parser.add_argument("--rows", type=parse_rows, default=ROWS, help="rows of x: 1,16,512")
    parser.add_argument("--impls", default="", help="parts of implementations' names: grouped,wgmma (default: all)")
    parser.add_argument("--commit", help="the commit to name in every row (default: asked of git)")
    arguments = parser.parse_args()
    impls = tuple(part for part in arguments.impls.split(",") if part)

    def line(row: Row, rate: float) -> str:
        name = f"{row['part']:8}{row['impl']:28}rows={row['rows']:<6}chosen={row['chosen']:<4}"
        return f"{name}{row['us_p50']:9.2f} us  limit {row['limit_us']:7.2f}"

    write_rows(
        "bench_moe", arguments, COLUMNS, lambda: (row for rows in arguments.rows for row in rows_of(rows, impls)), line
    )


if __name__ == "__main__":
    main()
