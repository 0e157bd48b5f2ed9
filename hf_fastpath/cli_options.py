"""Options that commands of the command line share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hf_fastpath.config import FastpathConfig

Model = Annotated[str | None, typer.Option("--model", metavar="PATH_OR_ID", help="Default: SmolLM2-135M-Instruct.")]
Prompt = Annotated[str | None, typer.Option("--prompt", help="What to ask the model.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option("--dtype", help="bf16, fp16, fp32 or auto (what the checkpoint names).")]
Weights = Annotated[str, typer.Option("--weights", help="w4a16, w16a16 or none.")]
Head = Annotated[str, typer.Option("--lm-head", help="int4, int8 or none.")]
KVCache = Annotated[str, typer.Option("--kv-cache", help="int8, fp8, int4, h2o, static or none.")]
KVBudget = Annotated[int, typer.Option("--kv-budget", help="Tokens that --kv-cache h2o keeps.")]
GroupSize = Annotated[int, typer.Option("--group-size", help="Weights that share a scale: 128, 64 or 32.")]
ZeroPoints = Annotated[bool, typer.Option("--zero-points/--no-zero-points", help="Asymmetric int4.")]
Search = Annotated[str | None, typer.Option("--scale-search", help="How scales are chosen (see FastpathConfig).")]
Calibration = Annotated[
    Path | None, typer.Option("--calibration", help="UTF-8 text to choose int4 weights by. Default: the model's own.")
]
Text = Annotated[
    Path | None, typer.Option("--text", help="UTF-8 text for the perplexity. Default: WikiText-2's start.")
]
Window = Annotated[int, typer.Option("--window", help="Tokens in one forward pass of the perplexity.")]
MaxWindows = Annotated[int, typer.Option("--max-windows", help="Windows to measure; 0 is all of the text.")]
Family = Annotated[
    str | None, typer.Option("--family", help="lfm2 or gpt2: a small story model that ships with the package.")
]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the numbers to this file.")]


def build_config(
    weights: str, lm_head: str, kv_cache: str, kv_budget: int, group_size: int, zero_points: bool, search: str | None
) -> FastpathConfig:
    """The configuration that the options ask for; the word "none" is None."""
    fields: dict[str, Any] = {"kv_budget": kv_budget, "group_size": group_size, "zero_points": zero_points}
    for name, value in (("weights", weights), ("lm_head", lm_head), ("kv_cache", kv_cache)):
        fields[name] = None if value.lower() == "none" else value
    if search is not None:
        fields["scale_search"] = search
    return FastpathConfig(**fields)


def text_options(text: Path | None, window: int, max_windows: int) -> dict[str, Any]:
    """Arguments of a perplexity, for the jobs that take them."""
    options: dict[str, Any] = {"window": window, "max_windows": max_windows or None}
    return {**options, "text": text} if text else options


def shipped(family: str | None, model: str | None, text: Path | None) -> tuple[str | None, Path | None]:
    """The model and the text of ``--family``, where it is given."""
    from hf_fastpath.eval import story_models

    if family is None:
        return model, text
    if model is not None:
        raise ValueError("--family names a model that ships with the package: leave out --model")
    return str(story_models.folder(family)), text or story_models.HELD_OUT
