"""``hf-fastpath bench generate``: generate() of stock transformers against patched models, on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hf_fastpath.cli_options import Device, Dtype, Family, Model, shipped

Shape = Annotated[
    str | None, typer.Option("--shape", help="Random weights of this shape instead, such as llama-3.1-8b; see below.")
]
Variants = Annotated[
    str | None,
    typer.Option("--variants", help="As in stock,lossless,w4a16+int8. Default: these and stock compiled."),
]
Batches = Annotated[str, typer.Option("--batches", help="Rows, as in 1,16,64.")]
Prompts = Annotated[str, typer.Option("--prompts", help="Tokens of the prompt, as in 512,8192.")]
New = Annotated[int, typer.Option("--new", help="New tokens a row.")]
StockNew = Annotated[
    int | None, typer.Option("--stock-new", help="New tokens a row of stock. Default: as many, up to 64.")
]
Compiled = Annotated[
    str, typer.Option("--compiled-batches", help="Rows of `compiled`, which takes a minute each. Default: the first.")
]
Sample = Annotated[str, typer.Option("--sample", help="greedy, top-p (and top-k) or top-p-only, or several.")]
Runs = Annotated[int, typer.Option("--runs", help="Runs of each measurement.")]
Search = Annotated[
    str, typer.Option("--scale-search", help="How int4 scales are chosen: it changes the time of patching, no speed.")
]
Out = Annotated[Path | None, typer.Option("--out", help="Also write a CSV file, row by row.")]
Append = Annotated[bool, typer.Option("--append", help="Add to the rows of --out.")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Also draw a PNG, SVG or PDF.")]
Profile = Annotated[
    Path | None, typer.Option("--profile", help="Also profile a decode step kernel by kernel, into this CSV file.")
]


def bench_generate(
    model: Model = None,
    family: Family = None,
    shape: Shape = None,
    variants: Variants = None,
    batches: Batches = "1,16,64",
    prompts: Prompts = "512",
    new: New = 128,
    stock_new: StockNew = None,
    compiled_batches: Compiled = "",
    sample: Sample = "greedy",
    runs: Runs = 3,
    scale_search: Search = "absmax",
    device: Device = "auto",
    dtype: Dtype = "bf16",
    out: Out = None,
    append: Append = False,
    plot: Plot = None,
    profile: Profile = None,
) -> None:
    """generate() of a model, stock, compiled and patched: speed, first token, memory, share of the memory's rate."""
    from hf_fastpath.eval import bench_generate as job
    from hf_fastpath.eval import generate_models as models
    from hf_fastpath.eval.loading import pick_device, pick_dtype
    from hf_fastpath.eval.sizes import parse_rows

    pick_dtype(dtype)
    sizes = job.Sizes(
        parse_rows(batches),
        parse_rows(prompts),
        new,
        stock_new,
        parse_rows(compiled_batches) if compiled_batches else None,
        tuple(name.strip() for name in sample.split(",")),
        runs,
        scale_search,
    )
    if shape is not None and family is not None:
        raise ValueError("--shape is for random weights and --family for a model that ships with the package")
    source = models.Source(shape, shipped(family, model, None)[0], pick_device(device).type, dtype)
    chosen = models.parse_variants(variants) if variants else models.DEFAULTS
    job.run(source, chosen, sizes, Console(), out, append, plot, profile)
