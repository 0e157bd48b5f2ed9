"""The build of the CUDA library, without a GPU: it compiles, links, loads, is cached, and fails in words."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_fastpath import build

# HF_FASTPATH_REQUIRE=nvcc turns the skip into a failure: CI must not be green because it compiled nothing.
REQUIRED = "nvcc" in os.environ.get("HF_FASTPATH_REQUIRE", "")
needs_compiler = pytest.mark.skipif(
    not REQUIRED and (build.find_nvcc() is None or build.find_ninja() is None), reason="nvcc or ninja is not installed"
)

# Loading is for the whole process and for good, so it happens in a process of its own.
LOAD = """
import time, torch
from hf_fastpath.build import load_library
from hf_fastpath.ops import IN_PYTHON, SCHEMAS
start = time.monotonic()
result = load_library(force=True, progress=False)
assert result.loaded, result.reason
assert load_library() is result
for name in set(SCHEMAS) - IN_PYTHON:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"hf_fastpath::{name}", "CUDA"), name
print(result.path, time.monotonic() - start)
"""


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


@pytest.fixture
def tiny_source(tmp_path: Path) -> Path:
    folder = tmp_path / "with space"
    folder.mkdir()
    (folder / "ops.cpp").write_text("int answer() { return 42; }\n")
    return folder


def fast_compile_flags() -> str:
    """What makes nvcc five times faster (from CUDA 12.9 on): what is compiled here is loaded, but never run."""
    nvcc = build.find_nvcc()
    assert nvcc is not None
    words = subprocess.run([str(nvcc), "--help"], capture_output=True, text=True, check=True).stdout
    return "--Ofast-compile max" if "--Ofast-compile" in words else ""


@needs_compiler
@pytest.mark.slow
def test_the_library_compiles_loads_and_is_cached(tmp_path: Path) -> None:
    environment = {
        "HF_FASTPATH_CACHE": str(tmp_path),
        "HF_FASTPATH_CUDA_ARCHS": "80;90a",
        "MAX_JOBS": "2",
        "NVCC_APPEND_FLAGS": fast_compile_flags(),
    }
    first = run_python(LOAD, **environment)
    assert first.returncode == 0, first.stderr
    path, _ = first.stdout.split()
    assert Path(path).is_relative_to(tmp_path)
    second = run_python(LOAD, **environment, HF_FASTPATH_NO_BUILD="1")  # the cached build is no build
    assert second.returncode == 0, second.stderr
    assert second.stdout.split()[0] == path
    assert float(second.stdout.split()[1]) < 5
    third = run_python(LOAD, **{**environment, "HF_FASTPATH_CUDA_ARCHS": "80"}, HF_FASTPATH_NO_BUILD="1")
    assert "HF_FASTPATH_NO_BUILD is set and there is no built library" in third.stderr


@needs_compiler
def test_an_output_appears_only_when_complete(tiny_source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "library.so"
    assert build.build_library(output, ["80"], progress=False, sources=tiny_source) == output
    assert output.read_bytes()[:4] == b"\x7fELF"
    assert [path.name for path in output.parent.iterdir()] == ["library.so"]


@needs_compiler
def test_a_compile_error_is_told_in_the_compilers_words(tiny_source: Path, tmp_path: Path) -> None:
    (tiny_source / "bad.cu").write_text("__global__ void kernel() { undeclared_thing(); }\n")
    with pytest.raises(RuntimeError, match="undeclared_thing") as caught:
        build.build_library(tmp_path / "library.so", ["80"], progress=False, sources=tiny_source)
    assert "HF_FASTPATH_CUDA_ARCHS" in str(caught.value)
    assert not (tmp_path / "library.so").exists()


@needs_compiler
def test_processes_that_need_it_at_once_build_it_once(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While another process holds the lock and builds, this one waits, and then finds the library there."""
    filelock = pytest.importorskip("filelock")
    monkeypatch.setenv("HF_FASTPATH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_FASTPATH_CUDA_ARCHS", "80")
    monkeypatch.setattr(build, "source_dir", lambda: tiny_source)
    real = filelock.FileLock

    class OtherProcessFirst(real):  # type: ignore[misc, valid-type]
        def __enter__(self) -> object:
            entered = super().__enter__()
            target = build._cached_path()
            assert target is not None
            target.parent.mkdir(parents=True)
            target.write_bytes(b"built by another process")
            return entered

    monkeypatch.setattr(filelock, "FileLock", OtherProcessFirst)
    monkeypatch.setattr(build, "build_library", lambda *_, **__: pytest.fail("built twice"))
    assert build.ensure_library().read_bytes() == b"built by another process"


@needs_compiler
def test_the_cache_knows_sources_and_architectures(tiny_source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "source_dir", lambda: tiny_source)
    monkeypatch.setenv("HF_FASTPATH_CUDA_ARCHS", "80")
    paths = {build._cached_path()}
    (tiny_source / "new.cuh").write_text("// one more file")
    paths.add(build._cached_path())
    monkeypatch.setenv("HF_FASTPATH_CUDA_ARCHS", "80;90a")
    paths.add(build._cached_path())
    assert len(paths) == 3


def test_without_nvcc_the_reason_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    assert build.library_path() is None
    for call in (build.ensure_library, lambda: build.build_library(tmp_path / "x.so", ["80"], progress=False)):
        with pytest.raises(RuntimeError, match=r"no nvcc: install the CUDA toolkit 12\.8 or newer, or set CUDA_HOME"):
            call()


def test_without_ninja_the_reason_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "find_nvcc", lambda: Path("/bin/true"))
    monkeypatch.setattr(build, "find_ninja", lambda: None)
    with pytest.raises(RuntimeError, match="no ninja: pip install ninja"):
        build.build_library(tmp_path / "x.so", ["80"], progress=False)


def test_without_a_gpu_nothing_is_loaded_and_the_reason_says_why() -> None:
    result = run_python(
        "from hf_fastpath.build import load_library; r = load_library(); assert not r.loaded; print(r.reason)",
        CUDA_VISIBLE_DEVICES="",
    )
    assert "built without CUDA" in result.stdout or "no CUDA GPU" in result.stdout, result


def test_architectures_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_FASTPATH_CUDA_ARCHS", raising=False)
    assert build.cuda_arch_list() == build.WHEEL_ARCHS
    monkeypatch.setenv("HF_FASTPATH_CUDA_ARCHS", "80; 90a,89+PTX")
    assert build.cuda_arch_list() == ("80", "90a", "89+PTX")
    assert build._gencode("89+PTX") == "-gencode=arch=compute_89,code=[sm_89,compute_89]"
    monkeypatch.setenv("HF_FASTPATH_CUDA_ARCHS", "9.0")
    with pytest.raises(ValueError, match=r"'9\.0' is no architecture"):
        build.cuda_arch_list()


def test_nvcc_is_taken_from_cuda_home_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.touch(mode=0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert build.find_nvcc() == nvcc


def test_a_wheels_library_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "__file__", str(tmp_path / "build.py"))
    (tmp_path / build.LIBRARY_NAME).touch()
    assert build.library_path() == tmp_path / build.LIBRARY_NAME
    assert build.ensure_library() == tmp_path / build.LIBRARY_NAME
