"""``hf-fastpath``: the command line. Each command parses its options and calls what does the work."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hf_fastpath import __version__, cli_eval, cli_generate
from hf_fastpath.cli_options import (
    Calibration,
    Device,
    Dtype,
    Family,
    GroupSize,
    Head,
    Json,
    KVBudget,
    KVCache,
    MaxWindows,
    Model,
    Prompt,
    Search,
    Text,
    Weights,
    Window,
    ZeroPoints,
    build_config,
    shipped,
    text_options,
)
from hf_fastpath.config import KV_BUDGET, ScaleSearch

app = typer.Typer(
    help="int4 weights and int8 KV caches for transformers models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

bench = typer.Typer(help="Benchmarks on this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@app.command()
def demo(
    model: Model = None,
    family: Family = None,
    prompt: Prompt = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=2, help="Tokens of a speed run.")] = 32,
    device: Device = "auto",
    dtype: Dtype = "bf16",
    weights: Weights = "w4a16",
    lm_head: Head = "none",
    kv_cache: KVCache = "int8",
    kv_budget: KVBudget = KV_BUDGET,
    group_size: GroupSize = 128,
    zero_points: ZeroPoints = True,
    scale_search: Search = None,
    calibration: Calibration = None,
    text: Text = None,
    window: Window = 1024,
    max_windows: MaxWindows = 8,
    json: Json = None,
) -> None:
    """Stock against patched on a real model: speed, memory, perplexity, and a generation to read."""
    from hf_fastpath.eval import demo as job

    config = build_config(weights, lm_head, kv_cache, kv_budget, group_size, zero_points, scale_search)
    model, text = shipped(family, model, text)
    prompt = prompt or (job.STORY_PROMPT if family else job.PROMPT)
    speed: dict[str, Any] = {"prompt": prompt, "new_tokens": max_new_tokens}
    options = speed | text_options(text, window, max_windows)
    request = job.Request(config, model, device, dtype, **options, json=json, calibration=calibration)
    job.run(request, Console())


app.command("eval")(cli_eval.evaluate)


@app.command()
def verify(
    model: Model = None,
    family: Family = None,
    text: Text = None,
    tokens: Annotated[int, typer.Option("--tokens", help="Of the text, in one forward pass.")] = 256,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Tokens of the greedy comparison.")] = 64,
    device: Device = "auto",
    dtype: Dtype = "bf16",
    weights: Weights = "w4a16",
    lm_head: Head = "none",
    kv_cache: KVCache = "int8",
    kv_budget: KVBudget = KV_BUDGET,
    group_size: GroupSize = 128,
    zero_points: ZeroPoints = True,
    scale_search: Search = None,
    json: Json = None,
) -> None:
    """A patched model against stock transformers in float32: every layer, the predictions, greedy generate()."""
    from hf_fastpath.eval import verify as job
    from hf_fastpath.eval.perplexity import SLICE

    config = build_config(weights, lm_head, kv_cache, kv_budget, group_size, zero_points, scale_search)
    model, text = shipped(family, model, text)
    request = job.Request(config, model, text or SLICE, device, dtype, tokens, max_new_tokens, json)
    job.run(request, Console())


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to ask the model.")],
    model: Model = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 256,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0 always takes the likeliest token.")
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="For a temperature above 0.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    weights: Weights = "w4a16",
    lm_head: Head = "none",
    kv_cache: KVCache = "int8",
    kv_budget: KVBudget = KV_BUDGET,
    group_size: GroupSize = 128,
    zero_points: ZeroPoints = True,
    scale_search: Search = None,
    calibration: Calibration = None,
    report: Annotated[bool, typer.Option("--report", help="Say what was patched and what was left.")] = False,
) -> None:
    """Streams a patched model's answer."""
    import torch

    from hf_fastpath import fastpath_report, patch_model
    from hf_fastpath.eval import demo as job

    console = Console()
    config = build_config(weights, lm_head, kv_cache, kv_budget, group_size, zero_points, scale_search)
    if calibration is None and config.scale_search is not ScaleSearch.OUTPUT:
        loaded = job.load_with_status(model, device, dtype, console, config)
    else:
        loaded = job.load_with_status(model, device, dtype, console)
        tokens = job.read_calibration(loaded, config, calibration)
        patch_model(loaded.model, config, calibration=tokens, progress=console.is_terminal)
    if report:
        print(fastpath_report(loaded.model))
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    job.stream(loaded, prompt, console, max_new_tokens=max_new_tokens, **sampling)


@bench.command("gemm")
def bench_gemm(
    shapes: Annotated[
        str, typer.Option("--shapes", help="In features x out features, as in 4096x28672,4096x4096.")
    ] = "",
    rows: Annotated[str, typer.Option("--rows", help="Rows of x, as in 1,16,64.")] = "1,2,4,8,16,32,64",
    group_size: GroupSize = 128,
    device: Device = "auto",
    dtype: Dtype = "bf16",
    out: Annotated[Path | None, typer.Option("--out", help="Also write a CSV file.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Also draw a PNG, SVG or PDF.")] = None,
) -> None:
    """The int4 product against 16-bit weights and tinygemm: time, and share of the memory's rate."""
    from hf_fastpath.eval import bench_gemm as job
    from hf_fastpath.eval.bench_ops import LINEAR_SHAPES
    from hf_fastpath.eval.loading import pick_device, pick_dtype
    from hf_fastpath.eval.sizes import parse_rows, parse_shapes

    wanted = parse_shapes(shapes) if shapes else tuple(LINEAR_SHAPES)
    sizes = job.Sizes(wanted, parse_rows(rows), group_size, pick_dtype(dtype))
    job.run(sizes, pick_device(device), Console(), out, plot)


@bench.command("attention")
def bench_attention(
    tokens: Annotated[str, typer.Option("--tokens", help="Tokens in the cache, as in 1024,32768.")] = "1024,4096,32768",
    batches: Annotated[str, typer.Option("--batches", help="Rows, as in 1,8.")] = "1,8",
    heads: Annotated[int, typer.Option("--heads", help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option("--kv-heads", help="Heads of keys and values.")] = 8,
    dim: Annotated[int, typer.Option("--dim", help="Channels of a head.")] = 128,
    kv_budget: KVBudget = KV_BUDGET,
    device: Device = "auto",
    dtype: Dtype = "bf16",
    out: Annotated[Path | None, typer.Option("--out", help="Also write a CSV file.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Also draw a PNG, SVG or PDF.")] = None,
) -> None:
    """Attention of one new token over every cache format, against torch's over 16 bits."""
    from hf_fastpath.eval import bench_attention as job
    from hf_fastpath.eval.loading import pick_device, pick_dtype
    from hf_fastpath.eval.sizes import parse_rows

    counts = parse_rows(batches), parse_rows(tokens)
    sizes = job.Sizes(*counts, heads, kv_heads, dim, pick_dtype(dtype), kv_budget)
    job.run(sizes, pick_device(device), Console(), out, plot)


bench.command("generate")(cli_generate.bench_generate)


@bench.command("plot")
def bench_plot(
    numbers: Annotated[Path, typer.Argument(help="A CSV file of `bench gemm --out` or `bench generate --out`.")],
    plot: Annotated[Path, typer.Argument(help="The PNG, SVG or PDF to draw.")],
) -> None:
    """Draws a CSV file of `bench gemm` or `bench generate`, of this or another machine."""
    from hf_fastpath.eval import bench_gemm as job
    from hf_fastpath.eval import generate_plots, generate_tables, plots

    generate_plots.check(plot)
    rows = generate_tables.read_csv(numbers)
    if rows and "tok_s" in rows[0]:
        generate_plots.draw(rows, plot)
    else:
        plots.bandwidth_over_rows(job.read_csv(numbers), plot)


@app.command()
def info() -> None:
    """What was found on this machine, what runs where, and what to do about what is missing."""
    from hf_fastpath import info as facts

    console = Console()
    found = Table("", "found", "what to do", title=f"hf_fastpath {__version__}", title_justify="left")
    for item in facts.findings():
        found.add_row(item.name, item.value, item.advice)
    where = Table("op", "on the CPU", "on a GPU", title="What runs where", title_justify="left")
    for op in facts.placements():
        where.add_row(op.op, op.cpu, op.cuda)
    console.print(found)
    console.print(where)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"hf-fastpath {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The entry point: a mistake or something unsupported is one line on stderr and exit code 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        from transformers.utils import logging

        logging.disable_progress_bar()
        app()
    except ValueError as error:  # Unsupported is one
        print(f"hf-fastpath: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
