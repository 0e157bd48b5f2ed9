"""``hf-fastpath eval --tasks``: benchmarks and WikiText-2 of a model as it came and as patched, side by side.

What is finished of a configuration is kept in ``OUT.parts/`` at once, and read back by the next run with the same
settings. Several processes (``accelerate launch --num_processes 2 -m hf_fastpath.cli eval ...``) share the questions
and the windows.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import importlib.metadata
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hf_fastpath import FastpathConfig, info, patch_model
from hf_fastpath.checks import check_model
from hf_fastpath.eval import demo
from hf_fastpath.eval.accuracy_job import Job, Request, benchmark_answers, perplexity, size_and_speed
from hf_fastpath.eval.compare import empty_cache
from hf_fastpath.eval.loading import Loaded, load
from hf_fastpath.eval.processes import Processes
from hf_fastpath.eval.sweep import STOCK, Candidate, Parts
from hf_fastpath.eval.task_data import WIKITEXT2, WIKITEXT2_FILE, TaskSource, parse_names, wikitext2_text
from hf_fastpath.eval.wikitext import Text
from hf_fastpath.patches import find_recipe


def run(request: Request, console: Console) -> dict[str, Any]:
    """Measures, writes the report and prints its table; returns the report.

    Raises:
        ValueError: something about the request does not fit, before anything long was done.
    """
    from hf_fastpath.eval import accuracy_report

    processes = Processes()
    console = console if processes.is_main else Console(quiet=True)
    with _quiet_libraries(), tempfile.TemporaryDirectory() as folder:
        job = prepare(request, console, processes, Path(folder))
        results = []
        for number, candidate in enumerate(request.candidates, 1):
            console.print(f"[bold]{candidate.name}[/] ({number} of {len(request.candidates)})", highlight=False)
            results.append(measure(job, candidate))
    report = accuracy_report.assemble(request.candidates, results, job.benchmarks, job.settings)
    if processes.is_main:
        plots = accuracy_report.write(report, request.out)
        console.print()
        for table in accuracy_report.tables(report):
            console.print(table)
        drawn = f"{len(plots)} plots" if plots else "no plots, which need matplotlib"
        console.print(f"Written: {request.out}.json, {request.out}.md, {drawn}.", highlight=False)
    return report


def prepare(request: Request, console: Console, processes: Processes, folder: Path) -> Job:
    """Everything that can be wrong is found here. folder: an empty one, for descriptions of tasks and packed models."""
    _check_out(request.out)
    if request.limit is not None and request.limit < 1:
        raise ValueError(f"limit={request.limit}: must be 1 or more")
    if request.batch_size < 1 or request.kv_chunk < 0 or request.new_tokens == 1 or request.new_tokens < 0:
        raise ValueError(
            f"batch_size={request.batch_size}, kv_chunk={request.kv_chunk}, new_tokens={request.new_tokens}: allowed "
            "are batch_size >= 1, kv_chunk >= 0, and new_tokens 0 or >= 2"
        )
    wanted = parse_names(request.tasks, request.shots)
    source = TaskSource(request.data_dir, folder / "tasks")
    plain = [(name, shots) for name, shots in wanted if name != WIKITEXT2]
    with console.status("Loading the benchmarks' data"):
        raw = wikitext2_text(request.data_dir) if len(plain) < len(wanted) else None
        benchmarks, tasks = source.benchmarks(plain) if plain else ([], {})
    loaded = demo.load_with_status(request.model, request.device, request.dtype, console)
    configs = [candidate.config for candidate in request.candidates if candidate.config is not None]
    find_recipe(loaded.model)
    for config in configs:
        check_model(loaded.model, config)
        empty_cache(loaded.model, config)
    packing = [config for config in configs if demo.packs_int4(config)]
    calibration = demo.read_calibration(loaded, (packing or configs)[0], request.calibration) if configs else None
    limit = getattr(loaded.model.config, "max_position_embeddings", None)
    text = Text.read(loaded.tokenizer, raw, request.window, limit, request.windows) if raw is not None else None
    files = sorted({path for task in tasks.values() for path in _files_of(task)})
    if raw is not None and request.data_dir is not None:
        files.append(str(request.data_dir / WIKITEXT2_FILE))
    settings = {
        "model": loaded.name,
        "dtype": request.dtype,
        "arithmetic": "float32" if demo.fits_float32(loaded.model) else request.dtype,
        "device": info.device_name(loaded.model.device),
        "processes": processes.count,
        "kv_chunk": request.kv_chunk,
        "batch_size": request.batch_size,
        "limit": request.limit,
        "seed": request.seed,
        "window": text.windows.shape[1] if text else None,
        "windows": len(text.windows) if text else None,
        "compared": request.compared,
        "new_tokens": request.new_tokens,
        "calibration": request.calibration.name if request.calibration else None,
        "data": {Path(path).name: _digest(Path(path)) for path in files} or "the hub",
        "versions": _versions(),
    }
    parts = Parts(request.out.with_name(f"{request.out.name}.parts"))
    return Job(request, benchmarks, tasks, text, settings, calibration, folder, parts, processes, console)


def measure(job: Job, candidate: Candidate) -> dict[str, Any]:
    """The results of a candidate by their names: ``"speed"``, ``"wikitext2"`` and the benchmarks'."""
    steps: dict[str, Callable[[Loaded], Any]] = {"speed": lambda loaded: size_and_speed(job, candidate, loaded)}
    if job.text is not None:
        steps[WIKITEXT2] = lambda loaded: perplexity(job, candidate, loaded)
    for benchmark in job.benchmarks:
        steps[benchmark.name] = lambda loaded, benchmark=benchmark: benchmark_answers(job, candidate, loaded, benchmark)  # type: ignore[misc]
    keys = {name: _key(job, candidate, name) for name in steps}
    found = {name: job.processes.gather(job.parts.get(key))[0] for name, key in keys.items()}
    missing = [name for name, result in found.items() if result is None]
    if not missing:
        job.console.print("  read back", highlight=False)
        return found
    compares = WIKITEXT2 in missing and candidate is not STOCK and job.request.compared > 0
    if compares and not any(job.processes.gather(bool(job.stock))):
        # After an interruption: the predictions to compare with are not kept. All processes or none make them again.
        with _model(job, STOCK) as loaded:
            perplexity(job, STOCK, loaded)
    with _model(job, candidate) as loaded:
        for name in missing:
            found[name] = steps[name](loaded)
            if job.processes.is_main:
                job.parts.put(keys[name], found[name])
    return found


@contextmanager
def _model(job: Job, candidate: Candidate) -> Iterator[Loaded]:
    """The model, patched; freed afterwards. What is packed is packed once for all candidates that share it."""
    request, config = job.request, candidate.config
    packed = job.folder / _packing(config) if config is not None and (config.packs_linears or config.lm_head) else None
    if packed is not None and packed.is_dir():
        with job.console.status("Loading the packed model"):
            loaded = load(str(packed), request.device, request.dtype, patch=config)
    else:
        loaded = demo.load_with_status(request.model, request.device, request.dtype, job.console)
        if config is not None:
            shown = dataclasses.replace(config, progress=config.progress and job.console.is_terminal)
            patch_model(loaded.model, shown, calibration=job.calibration if demo.packs_int4(config) else None)
        if packed is not None:
            loaded.model.save_pretrained(packed)
            loaded.tokenizer.save_pretrained(packed)
    try:
        yield loaded
    finally:
        del loaded
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _packing(config: FastpathConfig) -> str:
    """A name of what is packed, whatever it runs with."""
    running = {"kv_cache", "kv_budget", "kv_window", "kv_sinks", "progress", "fallback"}
    fields = {name: value for name, value in config.to_dict().items() if name not in running}
    return "packed-" + hashlib.sha256(repr(sorted(fields.items())).encode()).hexdigest()[:16]


def _key(job: Job, candidate: Candidate, name: str) -> dict[str, Any]:
    """Everything that a result depends on."""
    settings = dict(job.settings)
    if name != WIKITEXT2:
        for unused in ("window", "windows", "compared"):
            del settings[unused]
    if name != "speed":
        del settings["new_tokens"]
    shots = {benchmark.name: benchmark.shots for benchmark in job.benchmarks}.get(name)
    config = candidate.config.to_dict() | {"progress": None} if candidate.config else None
    return {"what": name, "shots": shots, "config": config, "settings": settings}


def _check_out(out: Path) -> None:
    if not out.absolute().parent.is_dir():
        raise ValueError(f"cannot write {out}.json: its folder does not exist")
    if out.suffix in (".json", ".md", ".png"):
        raise ValueError(f"--out {out}: give the report's name without an ending")


def _files_of(task: Any) -> list[str]:
    """The local files of a task."""
    kwargs = task.config.dataset_kwargs or {}
    return [str(path) for path in (kwargs.get("data_files") or {}).values()]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _versions() -> dict[str, str]:
    """With lm-eval's, which :mod:`hf_fastpath.eval.lm` misses in words where it is not installed."""
    return info.versions() | {"lm_eval": importlib.metadata.version("lm_eval")}


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """lm-eval and datasets tell a lot that is no news here, behind the progress bars."""
    levels = {name: logging.getLogger(name).level for name in ("lm_eval", "datasets")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        import datasets

        shown = datasets.is_progress_bar_enabled()
        datasets.disable_progress_bars()
        yield
        if shown:
            datasets.enable_progress_bars()
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
