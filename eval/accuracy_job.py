"""What an evaluation was asked for, and the measurements of one model, patched or not."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hf_fastpath.eval import demo
from hf_fastpath.eval.compare import bar, empty_cache
from hf_fastpath.eval.loading import Loaded
from hf_fastpath.eval.measure import cache_bytes_per_token, decode_rates, float32_parameters, weight_bytes
from hf_fastpath.eval.processes import Processes
from hf_fastpath.eval.sweep import Candidate, Parts
from hf_fastpath.eval.task_data import Benchmark
from hf_fastpath.eval.wikitext import WINDOW, StockPredictions, Text, score_text

SEED = 1234  # lm-eval's own


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command line asked for.

    tasks: see :func:`hf_fastpath.eval.task_data.parse_names`. limit: questions of each, of which the tasks of a group
    have an equal share, rounded up; None is all. windows: of WikiText-2; compared: of them, those in which predictions
    are compared with stock's. new_tokens: of a speed run; 0 measures none. out: the report's path without its ending.
    """

    candidates: list[Candidate]
    tasks: str
    out: Path
    model: str | None = None
    shots: int | None = None
    limit: int | None = None
    data_dir: Path | None = None
    device: str = "auto"
    dtype: str = "bf16"
    kv_chunk: int = 64
    batch_size: int = 16
    window: int = WINDOW
    windows: int | None = None
    compared: int = 4
    new_tokens: int = 32
    seed: int = SEED
    calibration: Path | None = None


@dataclasses.dataclass
class Job:
    """A request whose every part is there and fits: what is left is the long work."""

    request: Request
    benchmarks: list[Benchmark]
    tasks: dict[str, Any]
    text: Text | None
    settings: dict[str, Any]
    calibration: torch.Tensor | None
    folder: Path  # empty, and gone afterwards
    parts: Parts
    processes: Processes
    console: Console
    stock: StockPredictions = dataclasses.field(default_factory=StockPredictions)
    encoded: Any = dataclasses.field(default_factory=dict)  # see FastpathLM
    asked: set[str] = dataclasses.field(default_factory=set)  # leaves whose questions are made


def size_and_speed(job: Job, candidate: Candidate, loaded: Loaded) -> dict[str, Any]:
    """Bytes, and greedy batch-1 decode speed with generate()."""
    speed, tokens = None, job.request.new_tokens
    if tokens:
        with bar(job.console, "  decode speed") as step:
            rate = decode_rates(loaded.model, demo.encode_prompt(loaded, demo.PROMPT), tokens, progress=step)
        speed = dataclasses.asdict(rate)
    kv_bytes = cache_bytes_per_token(loaded.model, empty_cache(loaded.model, candidate.config))
    return {"decode": speed, "weight_bytes": weight_bytes(loaded.model), "kv_bytes_per_token": kv_bytes}


def perplexity(job: Job, candidate: Candidate, loaded: Loaded) -> dict[str, Any]:
    """A :class:`TextScore` of WikiText-2, as plain JSON types."""
    assert job.text is not None
    request = job.request
    with _precision(loaded), bar(job.console, "  WikiText-2") as step:
        return score_text(
            loaded.model,
            job.text,
            lambda: empty_cache(loaded.model, candidate.config),
            kv_chunk=request.kv_chunk or job.text.windows.shape[1],
            batch_size=request.batch_size,
            stock=job.stock if request.compared else None,
            compared=request.compared,
            processes=job.processes,
            progress=step,
        ).to_dict()


def benchmark_answers(job: Job, candidate: Candidate, loaded: Loaded, benchmark: Benchmark) -> dict[str, Any]:
    """``metrics``: lm-eval's, of every leaf. ``items``: of multiple choice, a row a question: the log-likelihoods of
    its choices, 1 where it is answered rightly by likelihood, and by likelihood a character. ``prompts``: their hash.
    ``tokens``: the mean length of what the model reads.
    """
    from lm_eval.evaluator import evaluate

    from hf_fastpath.eval.lm import FastpathLM

    request = job.request
    tasks = {leaf: job.tasks[leaf] for leaf in benchmark.leaves}
    for leaf, task in tasks.items():
        if leaf in job.asked:
            _ask_again(task)
        else:
            task.set_config(key="num_fewshot", value=benchmark.shots)
            task.set_fewshot_seed(seed=request.seed)
    with _precision(loaded), bar(job.console, f"  {benchmark.name}, {benchmark.shots}-shot") as step:
        lm = FastpathLM(
            loaded.model,
            loaded.tokenizer,
            request.kv_chunk,
            batch_size=request.batch_size,
            on_progress=step,
            encoded=job.encoded,
        )
        with contextlib.redirect_stderr(io.StringIO()), _templates_compiled_once():  # its bars are over the questions
            results: Any = evaluate(
                lm,
                {"tasks": tasks, "groups": {}, "group_map": {}},
                limit=benchmark.limit(request.limit),
                bootstrap_iters=0,
            )
    job.asked |= tasks.keys()
    items, prompts = [], hashlib.sha256()
    for leaf in benchmark.leaves:
        for sample in sorted(results["samples"][leaf], key=lambda sample: sample["doc_id"]):
            prompts.update(f"{sample['doc_hash']}{sample['prompt_hash']}".encode())
            if job.tasks[leaf].OUTPUT_TYPE == "multiple_choice" and "acc" in sample:
                likelihoods = [round(answer[0], 5) for answer in sample["filtered_resps"]]
                items.append([likelihoods, int(sample["acc"]), int(sample.get("acc_norm", sample["acc"]))])
    metrics = {
        leaf.removesuffix("_local"): {
            name: value for name, value in results["results"][leaf].items() if isinstance(value, int | float)
        }
        for leaf in benchmark.leaves
    }
    tokens = lm.tokens_seen / max(lm.requests_seen, 1)
    return {"metrics": metrics, "items": items, "prompts": prompts.hexdigest(), "mode": lm.mode, "tokens": tokens}


def _ask_again(task: Any) -> None:
    """lm-eval makes every prompt anew for every model, which takes longer than a small model on a GPU. These are the
    same, so they stay, without the answers."""
    for instance in task.instances:
        instance.resps, instance.filtered_resps = [], {}
    task.build_all_requests = lambda **options: None


@contextlib.contextmanager
def _templates_compiled_once() -> Iterator[None]:
    """lm-eval compiles a question's template anew for every example shown: most of the time that prompts take."""
    from lm_eval.utils import env

    env.from_string = functools.cache(env.from_string)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del env.from_string  # the class's own is there again


def _precision(loaded: Loaded) -> Any:
    return float32_parameters(loaded.model) if demo.fits_float32(loaded.model) else nullcontext()
