"""hf-fastpath bench gemm on the CPU: what it measures, writes and refuses. Times are not judged."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hf_fastpath import cli
from hf_fastpath.eval import bench_gemm


def bench(*args: str) -> Any:
    return CliRunner().invoke(cli.app, ["bench", *args])


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_gemm, "_CPU_SECONDS", 0.0)
    monkeypatch.setattr(bench_gemm, "_CPU_COPY_BYTES", 4000)
    monkeypatch.setattr(bench_gemm, "_CPU_ROTATE_BYTES", 1)


def test_table_csv_and_plot(tmp_path: Path) -> None:
    numbers, plot = tmp_path / "new" / "gemm.csv", tmp_path / "gemm.png"
    sizes = ("--shapes", "128x96,256x64", "--rows", "1,3", "--device", "cpu")
    result = bench("gemm", *sizes, "--group-size", "64", "--out", str(numbers), "--plot", str(plot))
    assert result.exit_code == 0, result.output
    assert "128 x 96" in result.output
    with numbers.open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = [(i, m, k) for k in ("128", "256") for m in ("1", "3") for i in ("hf_fastpath_int4", "torch_16bit")]
    assert [(row["impl"], row["m"], row["k"]) for row in rows] == expected
    ours, plain = rows[0], rows[1]
    # Codes, 16-bit scales, x and y; and 16-bit weights, x and y.
    assert int(ours["bytes"]) == 128 * 96 // 2 + 2 * 96 * 2 + 2 * (128 + 96)
    assert int(plain["bytes"]) == 128 * 96 * 2 + 2 * (128 + 96)
    assert float(ours["gb_s"]) == pytest.approx(int(ours["bytes"]) / float(ours["us_p50"]) / 1000, abs=0.06)
    assert ours["variant"] == "torch _weight_int4pack_mm_for_cpu"
    assert plot.read_bytes().startswith(b"\x89PNG")
    again = tmp_path / "again.svg"
    assert bench("plot", str(numbers), str(again)).exit_code == 0
    assert "<svg" in again.read_text()


def test_a_random_layer_multiplies_by_its_codes() -> None:
    sizes = bench_gemm.Sizes(((128, 48),))
    layer = bench_gemm.random_layer(128, 48, sizes, torch.device("cpu"))
    x = torch.randn(3, 128).bfloat16()
    expected = x.float() @ layer.dequantized_weight().float().T
    # The CPU's product rounds to bf16, 2^-8 relative to the largest.
    torch.testing.assert_close(layer(x).float(), expected, rtol=0, atol=2**-7 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--shapes", "128"), "in features x out features"),
        (("--shapes", "128xb"), "in features x out features"),
        (("--shapes", "100x64"), "multiple of the group size 128"),
        (("--rows", "1;2"), "write them as 1,16,64"),
        (("--rows", "0"), "allowed are 1 and more"),
        (("--group-size", "16"), "allowed are 128, 64, 32"),
        (("--dtype", "int8"), "allowed are 'bf16'"),
        (("--dtype", "auto"), "needs bf16, fp16 or fp32"),
    ],
)
def test_bad_sizes_are_refused(args: tuple[str, ...], message: str) -> None:
    result = bench("gemm", *args, "--device", "cpu")
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)


def test_a_file_that_is_no_benchmark_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    result = bench("plot", str(tmp_path / "other.csv"), str(tmp_path / "x.png"))
    assert "not a CSV of" in str(result.exception)
