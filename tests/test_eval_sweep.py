"""Sweeps as files and as the default, and the results that are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_fastpath import FastpathConfig
from hf_fastpath.eval import sweep


def test_the_default_has_every_cache_with_and_without_int4() -> None:
    names = [candidate.name for candidate in sweep.default_sweep(FastpathConfig(kv_budget=512))]
    assert names == [
        *("stock", "STATIC KV only", "INT8 KV only", "FP8 KV only", "INT4 KV only", "H2O KV only, 512 tokens"),
        *("W4A16 only", "W4A16 + INT8 KV", "W4A16 + FP8 KV", "W4A16 + INT4 KV", "W4A16 + H2O KV, 512 tokens"),
    ]


def test_a_file_is_over_the_options(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text("- {weights: null, kv_cache: int4}\n- {name: small groups, group_size: 32}\n")
    base = FastpathConfig(zero_points=False)
    stock, cache, groups = sweep.read_sweep(path, base)
    assert stock == sweep.STOCK
    assert (cache.name, groups.name) == ("INT4 KV only", "small groups")
    assert groups.config == FastpathConfig(zero_points=False, group_size=32)
    path.write_text('[{"kv_cache": "fp8"}]')
    assert sweep.read_sweep(path, base)[1].name == "W4A16 + FP8 KV"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kv_cache: int8", "must be a list of configurations"),
        ("[]", "must be a list"),
        ("- {kv_cache: int3}", r"configuration 1: FastpathConfig\.kv_cache='int3'"),
        ("- {cache: int8}", "has no 'cache'"),
        ("- {kv_cache: int8}\n- {kv_cache: int8}", "'W4A16 \\+ INT8 KV' is there twice"),
        ("- {kv_cache: [", "cannot read the sweep"),
    ],
)
def test_mistakes_in_a_file_are_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        sweep.read_sweep(path, FastpathConfig())
    with pytest.raises(ValueError, match="cannot read the sweep"):
        sweep.read_sweep(tmp_path / "nowhere.yaml", FastpathConfig())


def test_results_are_kept_by_all_that_they_depend_on(tmp_path: Path) -> None:
    parts = sweep.Parts(tmp_path / "parts")
    assert parts.get({"a": 1}) is None
    parts.put({"a": 1, "b": [2]}, {"x": 0.5})
    assert parts.get({"b": [2], "a": 1}) == {"x": 0.5}
    assert parts.get({"a": 1, "b": [3]}) is None
    (path,) = (tmp_path / "parts").iterdir()
    path.write_text("half a")
    with pytest.raises(ValueError, match="delete it"):
        parts.get({"a": 1, "b": [2]})
