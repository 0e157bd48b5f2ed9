"""``hf-fastpath bench generate``: generate() of stock transformers against patched models, on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hf_fastpath.cli_options import Device, Dtype, Family, Model, shipped

Shape = Annotated[
    str | None,
    typer.Option(
        "--shape",
        help="Random weights of a real shape instead: llama-3.1-8b, lfm2.5-8b-a1b, lfm2-1.2b, llama-3.2-1b, qwen3-8b, "
        "gpt2.",
    ),
]
Variants = Annotated[
    str | None,
    typer.Option(
        "--variants",
        help="stock, compiled (static cache and torch.compile), lossless, w4a16+static, w4a16+int8, w4a16+fp8, "
        "w4a16+int4, w4a16+h2o, w4a16+int8+int8-head or w4a16+int4+int8-head, with commas between. Default: "
        "stock,compiled,lossless,w4a16+int8.",
    ),
]
Batches = Annotated[str | None, typer.Option("--batches", help="Rows. Default: 1,16,64; on a CPU 1.")]
Prompts = Annotated[
    str | None, typer.Option("--prompts", help="Tokens of the prompt, as in 512,8192. Default: 512; on a CPU 64.")
]
New = Annotated[int | None, typer.Option("--new", help="New tokens a row. Default: 128; on a CPU 32.")]
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
    Path | None,
    typer.Option("--profile", help="Also profile tokens and prompts kernel by kernel, into this CSV file."),
]
Commit = Annotated[str | None, typer.Option("--commit", help="To name in every row. Default: what git says.")]


def bench_generate(
    model: Model = None,
    family: Family = None,
    shape: Shape = None,
    variants: Variants = None,
    batches: Batches = None,
    prompts: Prompts = None,
    new: New = None,
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
    commit: Commit = None,
) -> None:
    """generate() of a model, stock, compiled and patched: speed, first token, memory, share of the memory's rate."""
    from hf_fastpath.eval import bench_generate as job
    from hf_fastpath.eval import generate_models as models
    from hf_fastpath.eval.loading import pick_device, pick_dtype
    from hf_fastpath.eval.sizes import parse_rows

    pick_dtype(dtype)
    target = pick_device(device).type
    usual_batches, usual_prompt, usual_new = ("1,16,64", "512", 128) if target == "cuda" else ("1", "64", 32)
    sizes = job.Sizes(
        parse_rows(batches or usual_batches),
        parse_rows(prompts or usual_prompt),
        usual_new if new is None else new,
        stock_new,
        parse_rows(compiled_batches) if compiled_batches else None,
        tuple(name.strip() for name in sample.split(",")),
        runs,
        scale_search,
        commit,
    )
    if shape is not None and family is not None:
        raise ValueError("--shape is for random weights and --family for a model that ships with the package")
    source = models.Source(shape, shipped(family, model, None)[0], target, dtype)
    chosen = models.parse_variants(variants) if variants else models.DEFAULTS
    job.run(source, chosen, sizes, Console(), out, append, plot, profile)
