"""hf-fastpath bench attention on the CPU: what it measures, writes and refuses. Times are not judged."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hf_fastpath import cli
from hf_fastpath.eval import bench_attention, bench_gemm
from hf_fastpath.eval.bench_attention import FORMATS, Sizes, bytes_read, filled_layer

SMALL = Sizes((2,), (150,), 4, 2, 64, torch.float32, 48)


def bench(*args: str) -> Any:
    return CliRunner().invoke(cli.app, ["bench", "attention", "--device", "cpu", *args])


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_gemm, "_CPU_SECONDS", 0.0)
    monkeypatch.setattr(bench_gemm, "_CPU_COPY_BYTES", 4000)
    monkeypatch.setattr(bench_gemm, "_CPU_ROTATE_BYTES", 1)


def test_table_csv_and_plot(tmp_path: Path) -> None:
    numbers, plot = tmp_path / "new" / "attention.csv", tmp_path / "attention.png"
    sizes = ("--tokens", "70,300", "--batches", "1,2", "--heads", "4", "--kv-heads", "2", "--dim", "64")
    result = bench(*sizes, "--kv-budget", "48", "--out", str(numbers), "--plot", str(plot))
    assert result.exit_code == 0, result.output
    with numbers.open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = [(i, b, t) for b in ("1", "2") for t in ("70", "300") for i in ("sdpa", *FORMATS)]
    assert [(row["impl"], row["batch"], row["tokens"]) for row in rows] == expected
    by_impl = {row["impl"]: int(row["bytes"]) for row in rows if (row["batch"], row["tokens"]) == ("2", "300")}
    payload = 2 * 2 * 2 * 300 * 64  # keys and values, rows, heads, tokens, channels
    assert by_impl["sdpa"] == 2 * payload
    assert by_impl["static"] == 2 * payload + 4 * 4
    assert by_impl["int8"] == payload + payload // 64 * 2 + 4 * 4
    assert payload < by_impl["fp8"] < 2 * payload
    assert payload // 2 < by_impl["int4"] < by_impl["fp8"]
    assert by_impl["h2o"] < by_impl["int4"]
    row = rows[1]
    assert float(row["gb_s"]) == pytest.approx(int(row["bytes"]) / float(row["us_p50"]) / 1000, abs=0.06)
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("impl", FORMATS)
def test_a_call_attends_to_all_tokens(impl: str) -> None:
    layer = filled_layer(impl, 2, 150, SMALL, torch.device("cpu"))
    stored = int(layer.storage[-1].flatten()[0])
    assert stored == (48 if impl == "h2o" else 150)
    assert bytes_read(layer, stored) <= layer.nbytes
    _, make = bench_attention.implementation(impl, 2, 150, SMALL, torch.device("cpu"))
    out = make()()
    assert out.shape == (2, 4, 64)
    assert bool(out.isfinite().all())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--heads", "5", "--kv-heads", "2"), "must be a multiple of kv_heads"),
        (("--tokens", "0"), "allowed are 1 and more"),
        (("--batches", "x"), "write them as 1,16,64"),
        (("--dtype", "auto"), "needs bf16, fp16 or fp32"),
    ],
)
def test_bad_sizes_are_refused(args: tuple[str, ...], message: str) -> None:
    result = bench(*args)
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)
