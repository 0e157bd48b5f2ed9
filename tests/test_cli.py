"""The command line: its commands, its options, and mistakes as one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hf_fastpath import FastpathConfig, __version__, build, cli, info, ops
from hf_fastpath.eval import accuracy, demo, sweep


def hf_fastpath(*args: str) -> Any:
    return CliRunner().invoke(cli.app, list(args))


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[demo.Request]:
    """What the commands ask the demo's job for, instead of running it."""
    asked: list[demo.Request] = []
    monkeypatch.setattr(demo, "run", lambda request, console: asked.append(request))
    return asked


def test_commands_and_version() -> None:
    listing = hf_fastpath("--help").output
    for command in ("demo", "eval", "generate", "info"):
        assert command in listing
    assert hf_fastpath("--version").output == f"hf-fastpath {__version__}\n"


def test_demo_by_default(requests: list[demo.Request]) -> None:
    assert hf_fastpath("demo").exit_code == 0
    assert requests == [demo.Request(FastpathConfig())]


def test_options_reach_the_job(requests: list[demo.Request], tmp_path: Path) -> None:
    options = {
        "model": "some/model",
        "device": "cpu",
        "dtype": "fp16",
        "prompt": "Hi",
        "max-new-tokens": 7,
        "weights": "none",
        "kv-cache": "static",
        "group-size": 64,
        "scale-search": "mse",
        "window": 99,
        "max-windows": 0,
        "text": tmp_path,
        "json": "out.json",
        "calibration": "read.txt",
    }
    args = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    result = hf_fastpath("demo", "--no-zero-points", *args)
    assert result.exit_code == 0
    config = FastpathConfig(
        weights=None,
        kv_cache="static",
        group_size=64,
        zero_points=False,
        scale_search="mse",  # type: ignore[arg-type]
    )
    files = {"json": Path("out.json"), "calibration": Path("read.txt")}
    wanted = demo.Request(config, "some/model", "cpu", "fp16", "Hi", 7, tmp_path, 99, None, **files)
    assert requests == [wanted]


def test_eval_measures_all_of_the_text_and_no_speed(requests: list[demo.Request]) -> None:
    assert hf_fastpath("eval", "--window", "512").exit_code == 0
    assert requests == [demo.Request(FastpathConfig(), new_tokens=0, window=512, max_windows=None)]


def test_eval_with_tasks_asks_for_a_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[accuracy.Request] = []
    monkeypatch.setattr(accuracy, "run", lambda request, console: asked.append(request))
    args = "--tasks mmlu:0,wikitext2 --out mine --limit 50 --kv-chunk 7 --batch-size 3 --max-windows 9 --window 512"
    rest = "--num-fewshot 2 --data-dir here --compared-windows 1 --max-new-tokens 0 --seed 5 --device cpu"
    result = hf_fastpath("eval", "--kv-cache", "int4", *args.split(), *rest.split())
    assert result.exit_code == 0, result.output
    wanted = accuracy.Request(
        sweep.single(FastpathConfig(kv_cache="int4")),  # type: ignore[arg-type]
        "mmlu:0,wikitext2",
        Path("mine"),
        shots=2,
        limit=50,
        data_dir=Path("here"),
        device="cpu",
        kv_chunk=7,
        batch_size=3,
        window=512,
        windows=9,
        compared=1,
        new_tokens=0,
        seed=5,
    )
    assert asked == [wanted]
    hf_fastpath("eval", "--tasks", "mmlu", "--out", "mine", "--sweep", "default")
    assert asked[1].candidates == sweep.default_sweep(FastpathConfig())
    path = tmp_path / "sweep.json"
    path.write_text('[{"kv_cache": "fp8"}]')
    hf_fastpath("eval", "--tasks", "mmlu", "--out", "mine", "--sweep", str(path))
    assert asked[2].candidates == sweep.read_sweep(path, FastpathConfig())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--sweep", "default"], "need --tasks"),
        (["--tasks", "mmlu"], "name it with --out"),
        (["--tasks", "mmlu", "--out", "mine", "--json", "mine.json"], "--json and --text"),
    ],
)
def test_options_of_eval_that_do_not_go_together(args: list[str], message: str) -> None:
    result = hf_fastpath("eval", *args)
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["demo", "--group-size", "48"], "allowed are 128, 64, 32"),
        (["eval", "--kv-cache", "int2"], "'static', 'int8', 'fp8', 'int4', 'h2o', None"),
        (["generate", "Hi", "--model", "absent/model-folder"], "cannot load 'absent/model-folder'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(args: list[str], message: str) -> None:
    command = [sys.executable, "-c", "from hf_fastpath.cli import main; main()", *args]
    environment = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ":".join(filter(None, sys.path))}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 2
    assert result.stderr.startswith("hf-fastpath: ")
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_info_names_every_op_and_thing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = hf_fastpath("info")
    assert result.exit_code == 0, result.output
    for name in (*ops.SCHEMAS, "torch", "transformers", "GPU", "nvcc", "kernel library", "cache folder"):
        assert name in result.output


def test_info_where_there_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_here(*args: Any, **kwargs: Any) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    monkeypatch.setattr(build, "find_ninja", lambda: None)
    monkeypatch.setattr(build, "library_path", lambda: None)
    monkeypatch.setattr(subprocess, "run", not_here)
    found = {finding.name: finding for finding in info.findings()}
    for name in ("GPU", "NVIDIA driver", "nvcc", "ninja", "kernel library"):
        assert found[name].advice, f"{name}: nothing said about what to do"
    assert {placement.cuda for placement in info.placements()} == {"no GPU"}


@pytest.mark.parametrize(("version", "tested"), [("5.17.0", True), ("5.23.4", True), ("5.16.9", False), ("6.0", False)])
def test_info_knows_the_tested_transformers(monkeypatch: pytest.MonkeyPatch, version: str, tested: bool) -> None:
    monkeypatch.setattr(info.importlib.metadata, "version", lambda name: version)
    finding = next(finding for finding in info.findings() if finding.name == "transformers")
    assert (finding.advice == "") == tested


def test_library_archs_are_read_from_the_file(tmp_path: Path) -> None:
    library = tmp_path / "_kernels.so"
    library.write_bytes(b"\x7fELF -arch sm_90a -m 64 \0.-arch sm_80 -m 64 \0.sm_61.-arch sm_75 -m 64 -l torch\0")
    assert info.library_archs(library) == ["sm_80", "sm_90a"]
