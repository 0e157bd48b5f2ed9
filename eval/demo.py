"""The demo: one real model, stock against patched, in speed, memory and perplexity, and a generation to look at."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import TextStreamer

from hf_fastpath import FastpathConfig, info, patch_model, unpatch_model
from hf_fastpath.calibration import calibration_tokens
from hf_fastpath.checks import check_model
from hf_fastpath.config import HeadFormat, ScaleSearch
from hf_fastpath.eval import compare
from hf_fastpath.eval.compare import Measured, Settings
from hf_fastpath.eval.loading import Loaded, encode_prompt, load
from hf_fastpath.eval.perplexity import SLICE
from hf_fastpath.patches import find_recipe

# Up to this many, the perplexity is computed in float32 where that is possible: 4 GB.
_FLOAT32_PARAMETERS = 1_000_000_000

STORY_PROMPT = "Once upon a time, there was a little girl named"  # for the models of --family
PROMPT = "Why is the sky blue? Answer in two sentences."


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command line asked for. ``new_tokens=0`` measures no speed and streams nothing."""

    config: FastpathConfig
    model: str | None = None
    device: str = "auto"
    dtype: str = "bf16"
    prompt: str = PROMPT
    new_tokens: int = 32
    text: Path = SLICE
    window: int = 1024
    max_windows: int | None = 8
    json: Path | None = None
    calibration: Path | None = None


def load_with_status(
    model: str | None, device: str, dtype: str, console: Console, patch: FastpathConfig | None = None
) -> Loaded:
    """Loads a model (see :func:`load`) behind a spinner that says when the demo's has to be converted first."""
    with console.status("Loading the model" if patch is None else "Loading and packing the model") as status:
        message = "Converting the demo's model from GGUF (once, 15 to 40 s)"

        def say() -> None:
            status.update(message)
            if not console.is_terminal:
                console.print(message)

        return load(model, device, dtype, say, patch)


def run(request: Request, console: Console) -> list[Measured]:
    """Measures and prints; returns the measurements, the stock model's first."""
    if request.json and not request.json.absolute().parent.is_dir():
        raise ValueError(f"cannot write {request.json}: its folder does not exist")
    started = time.perf_counter()
    loaded = load_with_status(request.model, request.device, request.dtype, console)
    find_recipe(loaded.model)  # before minutes of measuring, not after
    check_model(loaded.model, request.config)
    settings = perplexity_settings(loaded, request)
    calibration = read_calibration(loaded, request.config, request.calibration)
    console.print(f"[bold]{loaded.name}[/] on {info.device_name(loaded.model.device)}", highlight=False)
    results = [compare.measure(loaded.model, None, settings, console)]
    shown = dataclasses.replace(request.config, progress=request.config.progress and console.is_terminal)
    todo = compare.variants(shown)
    for index, config in enumerate(todo):
        last = index == len(todo) - 1
        patch_model(loaded.model, config, calibration=calibration if packs_int4(config) else None)
        if last and request.new_tokens:
            stream(loaded, request.prompt, console, max_new_tokens=max(request.new_tokens, 64), do_sample=False)
        results.append(compare.measure(loaded.model, config, settings, console))
        if not last:
            unpatch_model(loaded.model)  # only the cache was patched: nothing is lost
    console.print()
    console.print(compare.table(results, f"{loaded.name}: stock against patched"))
    console.print(_caption(loaded, request, settings, results), highlight=False)
    console.print(f"Done in {time.perf_counter() - started:.0f} s.", highlight=False)
    if request.json:
        request.json.write_text(json.dumps(_as_json(loaded, request, settings, results), indent=2) + "\n")
    return results


def packs_int4(config: FastpathConfig) -> bool:
    """Whether something becomes int4, for which a calibration text is read."""
    return config.packs_linears or config.lm_head is HeadFormat.INT4


def read_calibration(loaded: Loaded, config: FastpathConfig, path: Path | None) -> torch.Tensor | None:
    """The tokens of a calibration text; asking for one that nothing would read raises ValueError."""
    if path is None:
        return None
    if not packs_int4(config):
        raise ValueError("--calibration is for int4 weights, and these options leave all as they are")
    if config.scale_search not in (ScaleSearch.AUTO, ScaleSearch.OUTPUT):
        raise ValueError(f"--calibration needs --scale-search output: {config.scale_search.value!r} reads no text")
    return calibration_tokens(loaded.tokenizer, path)


def stream(loaded: Loaded, prompt: str, console: Console, **options: Any) -> None:
    """Prints the model's answer word by word."""
    inputs = encode_prompt(loaded, prompt)
    console.print(f"\n[dim]prompt:[/] {prompt}", highlight=False)
    streamer = TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
    loaded.model.generate(**inputs, streamer=streamer, **options)
    console.print()


def perplexity_settings(loaded: Loaded, request: Request) -> Settings:
    try:
        text = request.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {request.text}: {error}") from error
    # verbose=False: the text is longer than the model's context, but it is read window by window.
    ids = torch.tensor(loaded.tokenizer(text, verbose=False).input_ids)
    limit = getattr(loaded.model.config, "max_position_embeddings", None) or request.window
    prompt = encode_prompt(loaded, request.prompt) if request.new_tokens else None
    window = min(request.window, limit)
    return Settings(ids, window, request.max_windows, fits_float32(loaded.model), prompt, request.new_tokens)


def fits_float32(model: Any) -> bool:
    """Whether accuracy is measured in float32: on the CPU, where that is not too large. Rounding to bf16 moves the
    perplexity by as much as the int8 cache does. Kernels on a GPU are for 16 bits only."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return bool(model.device.type == "cpu" and parameters <= _FLOAT32_PARAMETERS)


def _caption(loaded: Loaded, request: Request, settings: Settings, results: list[Measured]) -> str:
    tokens = results[0].perplexity.tokens
    versions = ", ".join(f"{name} {version}" for name, version in info.versions().items())
    lines = [
        f"{info.device_name(loaded.model.device)}; {versions}; {request.dtype}.",
        f"Perplexity: {tokens:,} tokens of {request.text.name} in windows of {settings.window}, the quantized cache "
        f"in the loop, {'float32' if settings.float32_perplexity else request.dtype} arithmetic; ± is the standard "
        "error of the change.",
    ]
    if settings.prompt is not None:
        spread = max(result.decode.spread for result in results if result.decode)
        length = settings.prompt["input_ids"].shape[1]
        lines.append(
            f"Decode: generate(), greedy, batch 1, {settings.new_tokens} tokens after a prompt of {length}, median of "
            f"{settings.runs} runs that lie up to {spread:.0%} apart."
        )
    return "\n".join(lines)


def _as_json(loaded: Loaded, request: Request, settings: Settings, results: list[Measured]) -> dict[str, Any]:
    return {
        "model": loaded.name,
        "device": info.device_name(loaded.model.device),
        "versions": info.versions(),
        "dtype": request.dtype,
        "config": request.config.to_dict(),
        "calibration": request.calibration.name if request.calibration else None,
        "window": settings.window,
        "perplexity_dtype": "float32" if settings.float32_perplexity else request.dtype,
        "new_tokens": settings.new_tokens,
        "prompt_tokens": settings.prompt["input_ids"].shape[1] if settings.prompt is not None else None,
        "results": [result.to_dict(results[0]) for result in results],
    }
