"""``hf-fastpath eval``: perplexity of a text, or with --tasks benchmarks and WikiText-2, stock against patched."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

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
    Search,
    Text,
    Weights,
    ZeroPoints,
    build_config,
    shipped,
    text_options,
)
from hf_fastpath.config import KV_BUDGET

_WINDOW, _TASK_WINDOW = 1024, 2048

Tasks = Annotated[
    str | None,
    typer.Option(
        "--tasks",
        metavar="NAMES",
        help="Benchmarks of lm-eval, and wikitext2, as in hellaswag,arc_challenge:0,mmlu,wikitext2 (name:SHOTS).",
    ),
]
Sweep = Annotated[
    str | None,
    typer.Option(
        "--sweep",
        metavar="FILE",
        help='A JSON or YAML list of configurations to compare, or "default": every KV cache with and without int4.',
    ),
]
Out = Annotated[Path | None, typer.Option("--out", help="The report: OUT.json, OUT.md, plots. Goes on where it was.")]
DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Local files of the benchmarks. Default: lm-eval's, from the hub.")
]
Shots = Annotated[int | None, typer.Option("--num-fewshot", help="Examples shown. Default: the published numbers.")]
Limit = Annotated[int | None, typer.Option("--limit", help="Questions of each benchmark, of a group in all.")]
Chunk = Annotated[int, typer.Option("--kv-chunk", help="Tokens fed at once; 1 is token by token. The speed only.")]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Sequences at once.")]
Compared = Annotated[int, typer.Option("--compared-windows", help="Windows in which predictions are compared.")]
Speed = Annotated[int, typer.Option("--max-new-tokens", help="Tokens of a speed run with --tasks; 0 runs none.")]
Seed = Annotated[int, typer.Option("--seed", help="Of few-shot examples and of the bootstrap.")]


def evaluate(
    model: Model = None,
    family: Family = None,
    text: Text = None,
    tasks: Tasks = None,
    sweep: Sweep = None,
    out: Out = None,
    data_dir: DataDir = None,
    num_fewshot: Shots = None,
    limit: Limit = None,
    kv_chunk: Chunk = 64,
    batch_size: BatchSize = 16,
    window: Annotated[
        int | None,
        typer.Option("--window", help="Tokens that are a prediction's context. Default: 1024; wikitext2 2048."),
    ] = None,
    max_windows: MaxWindows = 0,
    compared_windows: Compared = 4,
    max_new_tokens: Speed = 32,
    seed: Seed = 1234,
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
    json: Json = None,
) -> None:
    """Perplexity of a text, or with --tasks benchmarks: stock against patched, with the quantized cache in the loop."""
    config = build_config(weights, lm_head, kv_cache, kv_budget, group_size, zero_points, scale_search)
    model, text = shipped(family, model, text)
    if tasks is None:
        if sweep or out or data_dir or limit or num_fewshot is not None:
            raise ValueError("--sweep, --out, --data-dir, --limit and --num-fewshot need --tasks, such as wikitext2")
        from hf_fastpath.eval import demo

        options = text_options(text, window or _WINDOW, max_windows)
        request = demo.Request(
            config, model, device, dtype, new_tokens=0, **options, json=json, calibration=calibration
        )
        demo.run(request, Console())
        return
    if json is not None or (text is not None and family is None):
        raise ValueError("--json and --text are for a perplexity without --tasks: the others' report has --out")
    if out is None:
        raise ValueError("--tasks writes a report: name it with --out, as in --out results/mine")
    from hf_fastpath.eval import accuracy

    job = accuracy.Request(
        _candidates(config, sweep),
        tasks,
        out,
        model,
        shots=num_fewshot,
        limit=limit,
        data_dir=data_dir,
        device=device,
        dtype=dtype,
        kv_chunk=kv_chunk,
        batch_size=batch_size,
        window=window or _TASK_WINDOW,
        windows=max_windows or None,
        compared=compared_windows,
        new_tokens=max_new_tokens,
        seed=seed,
        calibration=calibration,
    )
    accuracy.run(job, Console())


def _candidates(config: Any, sweep: str | None) -> list[Any]:
    from hf_fastpath.eval import sweep as sweeps

    if sweep is None:
        return sweeps.single(config)
    return sweeps.default_sweep(config) if sweep == sweeps.DEFAULT else sweeps.read_sweep(Path(sweep), config)
