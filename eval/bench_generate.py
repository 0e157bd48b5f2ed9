"""``hf-fastpath bench generate``: generate() of stock transformers and of patched variants, on this machine.

Every variant has a model of its own, one in memory at a time. Prompts are random tokens, and as usual there is an end
token to look for, one that never comes. One row of the CSV is one variant, batch size, prompt and way to choose tokens;
columns:

model, variant   a shape or a checkpoint; a name of VARIANTS in hf_fastpath.eval.generate_models
choice           greedy, or how tokens are drawn: a name of CHOICES
batch, prompt, new   rows, prompt tokens and new tokens of a row
tok_s            tokens a second of the whole batch, the prompt's own pass left out (median run); tok_s_low, tok_s_high
first_token_ms   generate() with one new token (median run)
setup_s          what the first call of these sizes takes longer than later ones: graphs are captured, or code compiled
patch_s, scale_search   seconds of patch_model() and how it chose the int4 codes: "absmax" is the quickest way, and the
                 speed of generate() does not depend on it; nothing for stock
weight_gb, patch_peak_gb, peak_gb   bytes of parameters and buffers; the most GPU memory allocated while patching, and
                 while generating
step_mb          what a step must read: weights once (of experts those that random choices need), and keys and values
                 at the mean length
limit_tok_s, of_limit   what the rate of a large copy allows for step_mb; tok_s over it
replay_tok_s     the graphs of a token, replayed back to back without generate()
copy_gb_s        rate of a large copy, bytes read plus written, in the same run
dtype, device, torch, transformers, commit

What a CPU cannot show is empty: memory, graphs, and the compiled step, which transformers makes on a GPU only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from rich.console import Console
from rich.progress import Progress

from hf_fastpath import FastpathConfig, info, patch_model
from hf_fastpath.errors import Unsupported
from hf_fastpath.eval import bench_gemm, profile_decode
from hf_fastpath.eval.bench_ops import commit_of
from hf_fastpath.eval.decode_bytes import step_bytes
from hf_fastpath.eval.generate_models import COMPILED, VARIANTS, Source
from hf_fastpath.eval.generate_tables import caption, summary
from hf_fastpath.eval.graph_replay import replay_of
from hf_fastpath.eval.measure import weight_bytes
from hf_fastpath.eval.row_writer import RowWriter
from hf_fastpath.runtime import require_device

COLUMNS = (
    *("model", "variant", "choice", "batch", "prompt", "new", "tok_s", "tok_s_low", "tok_s_high", "first_token_ms"),
    *("setup_s", "patch_s", "scale_search", "weight_gb", "patch_peak_gb", "peak_gb"),
    *("step_mb", "limit_tok_s", "of_limit", "replay_tok_s", "copy_gb_s"),
    *("dtype", "device", "torch", "transformers", "commit"),
)
CHOICES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "top-p": {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "top-p-only": {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 0.9},
}

Row = dict[str, Any]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What to measure.

    Args:
        new: tokens of a row; stock_new: of stock, which is slow, None: the same, up to 64.
        compiled_batches: of ``compiled``, which compiles anew for each, with the first prompt only; None: the first.
        choices: names of CHOICES. scale_search: of the int4 codes. commit: to name in every row; None: git is asked.

    Raises:
        ValueError: a number that is too small, or a name that there is not.
    """

    batches: tuple[int, ...] = (1, 16, 64)
    prompts: tuple[int, ...] = (512,)
    new: int = 128
    stock_new: int | None = None
    compiled_batches: tuple[int, ...] | None = None
    choices: tuple[str, ...] = ("greedy",)
    runs: int = 3
    scale_search: str = "absmax"
    commit: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("batches", 1), ("prompts", 1), ("compiled_batches", 1)):
            if min(getattr(self, name) or (least,)) < least:
                raise ValueError(f"{name} {getattr(self, name)}: allowed are {least} and more")
        for name, least in (("new", 4), ("stock_new", 4), ("runs", 1)):
            if (getattr(self, name) or least) < least or getattr(self, name) == 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}")
        FastpathConfig(scale_search=self.scale_search)  # type: ignore[arg-type]
        if unknown := [name for name in self.choices if name not in CHOICES]:
            raise ValueError(f"sampling {unknown[0]!r}: allowed are {', '.join(CHOICES)}")

    def of(self, variant: str) -> list[tuple[int, int, int, str]]:
        """(batch, prompt, new tokens, choice) of every row of a variant."""
        stock = VARIANTS[variant] is None
        new = (self.stock_new or min(self.new, 64)) if stock else self.new
        batches, prompts = self.batches, self.prompts
        if variant == COMPILED:
            batches, prompts = self.compiled_batches or batches[:1], prompts[:1]
        return [(b, p, new, choice) for p in prompts for b in batches for choice in self.choices]


def why_not(variant: str, device: torch.device) -> str:
    """Why a variant cannot be measured here; "" when it can."""
    if variant == COMPILED and device.type != "cuda":
        return f"{COMPILED}: transformers compiles the decode step on a GPU only"
    return ""


@dataclasses.dataclass
class Subject:
    """A model, as a variant has it."""

    model: Any
    facts: Row
    options: dict[str, Any]

    @property
    def on_gpu(self) -> bool:
        return bool(self.model.device.type == "cuda")

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.model.device)

    def peak_gb(self) -> float | str:
        """The most memory allocated since ``torch.cuda.reset_peak_memory_stats()``."""
        return round(torch.cuda.max_memory_allocated() / 1e9, 3) if self.on_gpu else ""


def prepare(source: Source, variant: str, sizes: Sizes, say: Callable[[str], None]) -> Subject | None:
    """The model of a variant, built and patched; None if it cannot be patched like this, which ``say`` is told."""
    model, name = source.build()
    model.generation_config.eos_token_id = model.config.get_text_config().vocab_size  # a token that never comes
    model.generation_config.pad_token_id = 0
    subject = Subject(model, {"model": name, "variant": variant, "dtype": str(model.dtype)[6:]}, {})
    overrides = VARIANTS[variant]
    if variant == COMPILED:
        subject.options["cache_implementation"] = "static"
    if overrides is None:
        return subject
    if subject.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    subject.wait()
    start = time.perf_counter()
    try:
        patch_model(model, {"scale_search": sizes.scale_search, "progress": False}, **overrides)
    except Unsupported as error:
        say(f"Not measured: {variant}: {error}")
        return None
    subject.wait()
    subject.facts["patch_s"] = round(time.perf_counter() - start, 2)
    packs = overrides.get("weights", "w4a16") == "w4a16"
    subject.facts |= {"scale_search": sizes.scale_search if packs else "", "patch_peak_gb": subject.peak_gb()}
    return subject


def check_length(model: Any, prompt: int, new: int) -> None:
    """Raises ValueError where a text of this length is too long for the model."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and prompt + new > most:
        raise ValueError(f"a prompt of {prompt} and {new} new tokens: the model has {most} positions")


def prompt_of(subject: Subject, batch: int, prompt: int) -> dict[str, torch.Tensor]:
    """Random tokens."""
    vocabulary = subject.model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (batch, prompt), device=subject.model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def measure(
    subject: Subject, inputs: dict[str, torch.Tensor], new: int, choice: str, runs: int, copy_gb_s: float
) -> Row:
    """One row's numbers."""
    model, (batch, prompt) = subject.model, inputs["input_ids"].shape
    how = CHOICES[choice] | subject.options
    if subject.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def seconds(count: int) -> float:
        start = time.perf_counter()
        model.generate(**inputs, **how, max_new_tokens=count)
        subject.wait()
        return time.perf_counter() - start

    once = seconds(new)
    first = statistics.median(seconds(1) for _ in range(runs))
    whole = [seconds(new) for _ in range(runs)]
    rates = [batch * (new - 1) / max(time - first, 1e-9) for time in whole]
    moved = step_bytes(model, batch, prompt + new / 2)
    limit = batch * copy_gb_s * 1e9 / moved
    return {
        **{"choice": choice, "batch": batch, "prompt": prompt, "new": new},
        **{"tok_s": round(statistics.median(rates), 1), "first_token_ms": round(1000 * first, 1)},
        **{"tok_s_low": round(min(rates), 1), "tok_s_high": round(max(rates), 1)},
        "setup_s": round(max(once - statistics.median(whole), 0.0), 2),
        **{"weight_gb": round(weight_bytes(model) / 1e9, 3), "peak_gb": subject.peak_gb()},
        **{"step_mb": round(moved / 1e6, 3), "limit_tok_s": round(limit, 1), "copy_gb_s": round(copy_gb_s, 1)},
        "of_limit": round(statistics.median(rates) / limit, 4),
    }


def replay_rate(subject: Subject, inputs: dict[str, torch.Tensor], new: int, choice: str) -> Row:
    """The column that a variant with CUDA graphs has, none for another one."""
    try:
        replay = replay_of(subject.model, inputs, 0, **CHOICES[choice] | subject.options)
    except Unsupported:
        return {}
    return {"replay_tok_s": round(replay.rate(inputs["input_ids"].shape[0], new), 1)}


def profiles_of(subject: Subject, inputs: dict[str, torch.Tensor], new: int, choice: str) -> list[list[Row]]:
    """What runs for a prompt, and for a token where that is a CUDA graph."""
    how, model = CHOICES[choice] | subject.options, subject.model
    found = [profile_decode.profile_prompt(lambda: model.generate(**inputs, **how, max_new_tokens=1))]
    with contextlib.suppress(Unsupported):
        found.append(profile_decode.profile(replay_of(model, inputs, new, **how)))
    return found


def each_call(
    source: Source,
    variants: tuple[str, ...],
    sizes: Sizes,
    say: Callable[[str], None],
    look: Callable[[Subject, dict[str, torch.Tensor], int, str], T],
) -> Iterator[T]:
    """What ``look`` finds out about each variant and call of generate(): a model, its inputs, how many new tokens and
    how they are chosen. ``say`` is told what cannot be measured."""
    device = torch.device(source.device)
    for variant in variants:
        if reason := why_not(variant, device):
            say(f"Not measured: {reason}")
            continue
        subject = prepare(source, variant, sizes, say)
        for batch, prompt, new, choice in sizes.of(variant) if subject else ():
            assert subject is not None
            check_length(subject.model, prompt, new)
            try:
                found = look(subject, prompt_of(subject, batch, prompt), new, choice)
            except torch.OutOfMemoryError:
                say(f"Not measured: {variant}, {batch} rows of {prompt} + {new} tokens: out of memory")
                continue
            yield found
        del subject
        free(device)


def rows(source: Source, variants: tuple[str, ...], sizes: Sizes, say: Callable[[str], None]) -> Iterator[Row]:
    """One row of the CSV after the other; see :func:`each_call`."""
    device = torch.device(source.device)
    copy_gb_s, where = bench_gemm.copy_rate(device), machine(device, sizes.commit)

    def look(subject: Subject, inputs: dict[str, torch.Tensor], new: int, choice: str) -> Row:
        row = subject.facts | measure(subject, inputs, new, choice, sizes.runs, copy_gb_s)
        return row | replay_rate(subject, inputs, new, choice) | where

    return each_call(source, variants, sizes, say, look)


def profiles(
    source: Source, variants: tuple[str, ...], sizes: Sizes, say: Callable[[str], None]
) -> Iterator[list[list[Row]]]:
    """The profiles of one row of the CSV after the other. Not in the same process before anything is measured: once a
    profiler was on, each launch takes the host longer."""
    where = machine(torch.device(source.device), sizes.commit)

    def look(subject: Subject, inputs: dict[str, torch.Tensor], new: int, choice: str) -> list[list[Row]]:
        batch, prompt = inputs["input_ids"].shape
        facts = subject.facts | {"choice": choice, "batch": batch, "prompt": prompt} | where
        return [[facts | kernel for kernel in found] for found in profiles_of(subject, inputs, new, choice)]

    return each_call(source, variants, sizes, say, look)


def machine(device: torch.device, commit: str | None) -> Row:
    """The columns that say where a row was measured."""
    return {
        "device": info.device_name(device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit or commit_of(Path(__file__).parent),
    }


def free(device: torch.device) -> None:
    """Gives back the memory of models that nobody has any more."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # what was compiled holds its model
    gc.collect()  # modules refer to each other
    if device.type == "cuda":
        torch.cuda.empty_cache()


def run(
    source: Source,
    variants: tuple[str, ...],
    sizes: Sizes,
    console: Console,
    out: Path | None = None,
    append: bool = False,
    plot: Path | None = None,
    profile: Path | None = None,
) -> list[Row]:
    """Measures and prints; writes each row to ``out`` as soon as it is there, then the plots and the profile.

    Args:
        append: add to the rows that ``out`` holds.
        plot: PNG, SVG or PDF, of the batch sizes; of the prompts, where there are several, beside it.

    Raises:
        ValueError: what was asked for cannot be done here; before anything is measured, if that can be known.
        Unsupported: no variant can be measured.
    """
    if plot:
        from hf_fastpath.eval import generate_plots  # says before the work that matplotlib is missing

        generate_plots.check(plot)
    if profile and source.device != "cuda":
        raise ValueError("--profile shows the kernels of a GPU, and this runs on the CPU")
    if any(VARIANTS[variant] is not None for variant in variants):
        require_device(torch.device(source.device))
    torch.manual_seed(0)
    found: list[Row] = []
    device = torch.device(source.device)
    total = sum(len(sizes.of(variant)) for variant in variants if not why_not(variant, device))
    with Progress(console=console) as progress, RowWriter(out, COLUMNS, "hf-fastpath bench generate", append) as writer:
        task = progress.add_task("Measuring", total=total)
        for row in rows(source, variants, sizes, progress.console.print):
            found.append(row)
            writer.write(row)
            progress.advance(task)
    if not found:
        raise Unsupported("none of the variants could be measured here")
    console.print(summary(found))
    console.print(caption(found), highlight=False)
    if plot:
        console.print("Plots:", *generate_plots.draw(found, plot))
    if profile:
        write_profiles(source, tuple(dict.fromkeys(row["variant"] for row in found)), sizes, console, profile)
    return found


def write_profiles(source: Source, variants: tuple[str, ...], sizes: Sizes, console: Console, out: Path) -> None:
    """Profiles what :func:`run` measured, prints it and writes it to a CSV file."""
    found: list[Row] = []
    with Progress(console=console) as progress:
        task = progress.add_task("Profiling", total=sum(len(sizes.of(variant)) for variant in variants))
        for each in profiles(source, variants, sizes, progress.console.print):
            for kernels in each:
                found += kernels
                profile_decode.show(kernels, progress.console)
            progress.advance(task)
    profile_decode.write(found, out)
