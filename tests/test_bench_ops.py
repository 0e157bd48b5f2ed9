"""What the benchmarks of kernels share, without a GPU: the CSV that they write."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hf_fastpath.build import LoadResult
from hf_fastpath.eval import bench_linear16, bench_moe, bench_moe16, bench_ops


def test_rows_are_written_with_rates_and_the_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_ops, "load_library", lambda: LoadResult(True, None, ""))
    monkeypatch.setattr(bench_ops, "copy_rate", lambda: 4000.0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")

    def rows() -> Iterator[bench_ops.Row]:
        yield {"op": "linear", "bytes": 6_000_000, "us_p50": 2.0}

    arguments = argparse.Namespace(out=tmp_path / "new" / "rows.csv", commit="abc")
    write = bench_ops.write_rows
    write("bench_x", arguments, bench_ops.COLUMNS, rows, lambda row, rate: f"{row['op']} {row['limit_us']} {rate}")
    (row,) = csv.DictReader(arguments.out.open())
    assert {name: value for name, value in row.items() if value} == {
        **{"op": "linear", "bytes": "6000000", "us_p50": "2.0", "gb_s": "3000", "limit_us": "1.5"},
        **{"copy_gb_s": "4000", "gpu": "a GPU", "torch": torch.__version__, "commit": "abc"},
    }
    assert capsys.readouterr().out == "linear 1.5 4000.0\n"


@pytest.mark.parametrize("module", [bench_ops, bench_moe, bench_moe16, bench_linear16], ids=lambda m: m.__name__)
def test_every_benchmark_writes_its_rows_so(module: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out, name = tmp_path / "rows.csv", module.__name__.rpartition(".")[2]  # type: ignore[attr-defined]
    monkeypatch.setattr("sys.argv", [name, "--out", str(out)])
    monkeypatch.setattr(bench_ops, "load_library", lambda: LoadResult(False, None, "no nvcc"))
    with pytest.raises(SystemExit, match=f"^{name}: no nvcc$"):
        module.main()  # type: ignore[attr-defined]
    assert not out.exists()
