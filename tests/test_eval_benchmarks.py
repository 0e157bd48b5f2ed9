"""The evaluation from end to end on a small model and the shipped sample: what it measures, keeps and writes."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_fastpath import FastpathConfig, Unsupported
from hf_fastpath.eval import accuracy, accuracy_plots, accuracy_report, story_models, sweep
from hf_fastpath.eval.processes import Processes

SAMPLE = Path(accuracy.__file__).with_name("data") / "sample"
CONFIG = FastpathConfig(scale_search="absmax", kv_cache="int8", progress=False)  # type: ignore[arg-type]
INT4_CACHE = FastpathConfig(weights=None, kv_cache="int4", progress=False)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def request_(tmp_path: Path) -> accuracy.Request:
    """The small GPT-2, two configurations, and tasks of all kinds."""
    candidates = [sweep.STOCK, sweep.Candidate("int4 cache", INT4_CACHE), sweep.Candidate("int4 weights", CONFIG)]
    return accuracy.Request(
        candidates,
        "wikitext2,hellaswag:1,mmlu:0,wikitext",
        tmp_path / "report",
        str(story_models.folder("gpt2")),
        data_dir=SAMPLE,
        device="cpu",
        limit=5,
        window=200,
        windows=3,
        compared=2,
        new_tokens=0,
        batch_size=4,
    )


def run(request: accuracy.Request) -> dict[str, Any]:
    return accuracy.run(request, Console(file=io.StringIO(), width=160))


def items(request: accuracy.Request, name: str) -> list[list[Any]]:
    """The kept answers of every configuration to a benchmark, stock's first."""
    parts = [json.loads(path.read_text()) for path in Path(f"{request.out}.parts").glob("*.json")]
    found = {json.dumps(part["key"]["config"]): part["result"] for part in parts if part["key"]["what"] == name}
    order = [candidate.config for candidate in request.candidates]
    keys = [json.dumps(config.to_dict() | {"progress": None} if config else None) for config in order]
    return [found[key]["items"] for key in keys]


def test_the_report(request_: accuracy.Request) -> None:
    report = run(request_)
    assert json.loads(Path(f"{request_.out}.json").read_text()) == json.loads(json.dumps(report))
    stock, cache, weights = report["configurations"]
    assert [row["name"] for row in (stock, cache, weights)] == ["stock", "int4 cache", "int4 weights"]
    assert stock["weight_bytes"] == cache["weight_bytes"] > weights["weight_bytes"]
    assert stock["kv_bytes_per_token"] > weights["kv_bytes_per_token"] > cache["kv_bytes_per_token"]
    assert stock["wikitext2"]["change"] == 0
    assert 0 < cache["wikitext2"]["kl"] < weights["wikitext2"]["kl"]
    assert stock["benchmarks"]["hellaswag"]["questions"] == 5
    assert stock["benchmarks"]["mmlu"]["questions"] == 2 * 3  # of each of two subjects
    for name in ("hellaswag", "mmlu"):
        for row, answers in zip((stock, cache, weights), items(request_, name), strict=True):
            found, column = row["benchmarks"][name], 2 if name == "hellaswag" else 1
            assert found["accuracy"] == pytest.approx(sum(item[column] for item in answers) / len(answers))
            assert found["delta"] == pytest.approx(found["accuracy"] - stock["benchmarks"][name]["accuracy"])
            assert (found["kl"] > 0) == (row is not stock)
    word = "word_perplexity,none"
    assert weights["benchmarks"]["wikitext"]["metrics"]["wikitext"][word] > 1
    text = Path(f"{request_.out}.md").read_text()
    for words in ("int4 cache", "hellaswag, 1-shot, 5 questions, acc_norm", "McNemar", "lm_eval 0.4", "windows of 200"):
        assert words in text
    for name in ("tradeoff", "perplexity", "agreement"):
        assert Path(f"{request_.out}_{name}.png").stat().st_size > 10_000


def test_a_report_is_written_again_from_its_numbers(
    request_: accuracy.Request, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(dataclasses.replace(request_, tasks="wikitext2,mmlu:0"))
    path = Path(f"{request_.out}.md")
    text = path.read_text()
    assert "Questions were read as in decoding, through each configuration's own KV cache, 64 tokens" in text
    path.unlink()
    monkeypatch.setattr(sys, "argv", ["accuracy_report", f"{request_.out}.json"])
    accuracy_report.main()
    assert path.read_text() == text
    shown = capsys.readouterr().out
    for table in ("Speed, memory, perplexity", "Accuracy: stock's"):
        assert f"## {table}" in shown
    for line in shown.splitlines():
        assert line in text


def test_a_single_pass_is_called_so(request_: accuracy.Request) -> None:
    request = dataclasses.replace(request_, tasks="mmlu:0", kv_chunk=0, limit=2, candidates=request_.candidates[:2])
    report = run(request)
    assert report["configurations"][1]["benchmarks"]["mmlu"]["likelihood_change"] < 0.01  # bf16 weights, other kernels
    assert "in which a quantized KV cache is not read" in accuracy_report.markdown(report)


def test_stock_answers_as_lm_evals_own_model(request_: accuracy.Request) -> None:
    """Through a full-precision cache in chunks, against HFLM's single pass over the same prompts."""
    request = dataclasses.replace(
        request_, candidates=[sweep.STOCK], tasks="hellaswag:1,mmlu:0", limit=None, dtype="fp32"
    )
    run(request)
    loaded = AutoModelForCausalLM.from_pretrained(request.model, dtype=torch.float32)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm = HFLM(pretrained=loaded, tokenizer=AutoTokenizer.from_pretrained(request.model), batch_size=2)
    for name, leaves in (("hellaswag", ["hellaswag"]), ("mmlu", ["mmlu_astronomy", "mmlu_world_religions"])):
        expected = [
            answer for leaf in leaves for answer in stock_answers(lm, request, leaf, 1 if name != "mmlu" else 0)
        ]
        (found,) = items(request, name)
        assert len(found) == len(expected) == 8 * len(leaves)
        for (likelihoods, *_), known in zip(found, expected, strict=True):
            assert likelihoods == pytest.approx(known, abs=2e-3)  # sums of up to 100 float32 log-probabilities


def stock_answers(lm: Any, request: accuracy.Request, leaf: str, shots: int) -> list[list[float]]:
    from lm_eval import simple_evaluate

    from hf_fastpath.eval.task_data import TaskSource

    _, tasks = TaskSource(SAMPLE, request.out.with_name(f"tasks-{leaf}")).benchmarks([(leaf, shots)])
    found: Any = simple_evaluate(
        model=lm, tasks=[*tasks.values()], num_fewshot=shots, fewshot_random_seed=request.seed, bootstrap_iters=0
    )
    (samples,) = found["samples"].values()
    return [[answer[0] for answer in sample["filtered_resps"]] for sample in samples]


def test_an_interrupted_run_goes_on_where_it_was(request_: accuracy.Request, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(dataclasses.replace(request_, out=request_.out.with_name("whole")))
    measured: list[tuple[str, str]] = []
    perplexity, benchmark = accuracy.perplexity, accuracy.benchmark_answers

    def counted_perplexity(job: Any, candidate: Any, loaded: Any) -> Any:
        measured.append((candidate.name, "wikitext2"))
        return perplexity(job, candidate, loaded)

    def counted_benchmark(job: Any, candidate: Any, loaded: Any, which: Any) -> Any:
        measured.append((candidate.name, which.name))
        if stop and (candidate.name, which.name) == ("int4 weights", "mmlu"):
            raise KeyboardInterrupt
        return benchmark(job, candidate, loaded, which)

    monkeypatch.setattr(accuracy, "perplexity", counted_perplexity)
    monkeypatch.setattr(accuracy, "benchmark_answers", counted_benchmark)
    stop = True
    with pytest.raises(KeyboardInterrupt):
        run(request_)
    assert len(measured) == 4 + 4 + 3
    stop, measured[:] = False, []
    assert run(request_)["configurations"] == whole["configurations"]
    assert measured == [("int4 weights", "mmlu"), ("int4 weights", "wikitext")]
    measured.clear()
    monkeypatch.setattr(accuracy, "_model", lambda *args: pytest.fail("a model was loaded"))
    run(request_)
    assert measured == []


def test_predictions_to_compare_with_are_made_again(
    request_: accuracy.Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = dataclasses.replace(request_, tasks="wikitext2")
    whole = run(dataclasses.replace(request, out=request.out.with_name("whole")))
    run(dataclasses.replace(request, candidates=request.candidates[:2]))
    assert run(request)["configurations"] == whole["configurations"]


def test_other_settings_are_measured_anew(request_: accuracy.Request) -> None:
    request = dataclasses.replace(request_, tasks="mmlu:0", candidates=request_.candidates[:1])
    run(request)
    parts = Path(f"{request.out}.parts")
    before = {path.name for path in parts.glob("*.json")}
    run(dataclasses.replace(request, limit=2))
    assert len({path.name for path in parts.glob("*.json")} - before) == 2  # the benchmark, and the sizes


@pytest.mark.slow
def test_two_processes_find_what_one_finds(request_: accuracy.Request) -> None:
    """To the last bit, since they share whole batches; with one thread, which is what each process has."""
    request = dataclasses.replace(
        request_, candidates=request_.candidates[:2], tasks="wikitext2,hellaswag:1,mmlu:0", limit=6, compared=1
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = run(request)
    torch.set_num_threads(threads)
    both = request.out.with_name("both")
    # What `accelerate launch` calls on several GPUs; on a CPU it starts no second process.
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "hf_fastpath.cli", "eval", "--model", str(request.model)]
    command += ["--tasks", request.tasks, "--data-dir", str(SAMPLE), "--out", str(both), "--device", "cpu"]
    command += ["--limit", "6", "--window", "200", "--max-windows", "3", "--compared-windows", "1"]
    command += ["--max-new-tokens", "0", "--batch-size", "4", "--weights", "none", "--kv-cache", "int4"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=both.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(Path(f"{both}.json").read_text())
    assert found["settings"]["processes"] == 2
    for row, known in zip(found["configurations"], alone["configurations"], strict=True):
        assert row["benchmarks"] == json.loads(json.dumps(known["benchmarks"]))
        for name, value in known["wikitext2"].items():  # sums of float64 in another order
            assert row["wikitext2"][name] == (value if value is None else pytest.approx(value, rel=1e-9))


def test_alone_there_is_nothing_to_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    processes = Processes()
    assert (processes.rank, processes.count, processes.is_main) == (0, 1, True)
    assert processes.gather("mine") == ["mine"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": "hellaswagg"}, "no task 'hellaswagg'"),
        ({"data_dir": Path("nowhere")}, "no such folder"),
        ({"limit": 0}, "limit=0"),
        ({"new_tokens": 1}, "new_tokens=1"),
        ({"out": Path("nowhere/report")}, "its folder does not exist"),
        ({"out": Path("report.json")}, "without an ending"),
        ({"window": 1}, "window >= 2"),
        ({"model": "./absent/model"}, "cannot load './absent/model'"),
    ],
    ids=str,
)
def test_mistakes_are_found_before_anything_is_measured(
    change: dict[str, Any], message: str, request_: accuracy.Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accuracy, "measure", lambda *args: pytest.fail("measured"))
    with pytest.raises(ValueError, match=message):
        run(dataclasses.replace(request_, **change))


def test_a_model_without_a_tokenizer_is_named(request_: accuracy.Request, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(request_.model).save_pretrained(tmp_path / "bare")
    with pytest.raises(Unsupported, match=r"bare.* has no tokenizer"):
        run(dataclasses.replace(request_, model=str(tmp_path / "bare")))


def test_answers_to_other_questions_are_not_compared(request_: accuracy.Request) -> None:
    request = dataclasses.replace(request_, tasks="mmlu:0", candidates=request_.candidates[:2])
    run(request)
    for path in Path(f"{request.out}.parts").glob("*.json"):
        part = json.loads(path.read_text())
        if part["key"]["what"] == "mmlu" and part["key"]["config"]:
            path.write_text(json.dumps(part | {"result": part["result"] | {"prompts": "others"}}))
    with pytest.raises(ValueError, match="other questions"):
        run(request)


def test_the_memory_of_a_plot_counts_what_h2o_keeps() -> None:
    row = {"weight_bytes": 1000, "kv_bytes_per_token": 10, "config": None}
    assert accuracy_plots.memory(row) == 1000 + 40_960
    assert accuracy_plots.memory(row | {"config": {"kv_cache": "h2o", "kv_budget": 512}}) == 1000 + 5120


def test_an_accuracy_of_guessing_is_called_so(request_: accuracy.Request) -> None:
    report = run(dataclasses.replace(request_, tasks="mmlu:0", candidates=request_.candidates[:1]))
    assert "what guessing gives (25.0%)" in accuracy_report.markdown(report)
    found = report["configurations"][0]["benchmarks"]["mmlu"]
    found |= {"accuracy": 0.9, "accuracy_se": 0.1}
    assert "guessing" not in accuracy_report.markdown(report)
