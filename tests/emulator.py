"""Compiles CUDA kernels with g++ against tests/cuda_emulator/ and runs them on CPU tensors.

A kernel that does what a GPU forbids or leaves undefined raises :class:`KernelFault`: an access beyond a tensor, a
misaligned one, a read of what nobody wrote, a write to an input, a race, a barrier that not all threads reach, a
shuffle from a lane that is not there.

The compiled library is kept in ``build/emulator`` and made again when a source changes.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_fastpath import build

HERE = Path(__file__).resolve().parent / "cuda_emulator"
CACHE = HERE.parent.parent / "build" / "emulator"
COMMON_FLAGS = shlex.split(
    "-std=c++17 -g1 -fPIC -fvisibility=hidden -ffp-contract=off -fno-strict-aliasing -Wall -Wno-unknown-pragmas "
    "-Wno-sign-compare -DHF_FASTPATH_EMULATED -include cuda_runtime.h"
)
EMULATOR_FLAGS = ["-O2"]
# The checks' calls, without the libraries that usually answer them; locals that nobody set hold a pattern, not zeros.
KERNEL_FLAGS = shlex.split(
    "-O1 -x c++ -fsanitize=thread --param tsan-instrument-func-entry-exit=0 -fno-sanitize-recover=all "
    "-fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero -ftrivial-auto-var-init=pattern"
)


class KernelFault(RuntimeError):
    """A kernel did what a GPU forbids or leaves undefined; the message says which thread did what where."""


@functools.cache
def cuda_include() -> Path | None:
    """The toolkit's headers, beside its nvcc; None without a toolkit."""
    nvcc = build.find_nvcc()
    if nvcc is None:
        return None
    # nvcc may be a script or a link to the real one; it knows where its headers are.
    dry_run = subprocess.run([str(nvcc), "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
    found = re.search(r'^#\$ INCLUDES="-I([^"]+?)"', dry_run.stderr, re.MULTILINE)
    candidates = [Path(found[1].strip())] if found else []
    candidates.append(nvcc.resolve().parent.parent / "include")
    return next((folder.resolve() for folder in candidates if (folder / "cuda_fp16.h").exists()), None)


def missing() -> str:
    """What the emulator lacks here; empty when it can be built."""
    if platform.machine() != "x86_64":
        return "the emulator's threads are written for x86-64"
    if shutil.which("g++") is None or shutil.which("nm") is None:
        return "g++ is not installed"
    return "" if cuda_include() else "the CUDA toolkit's headers are not installed"


# HF_FASTPATH_REQUIRE=nvcc turns the skip into a failure: CI must not be green because it ran no kernel.
needs_emulator = pytest.mark.skipif(
    "nvcc" not in os.environ.get("HF_FASTPATH_REQUIRE", "") and bool(missing()), reason=missing()
)


def _partial(path: Path) -> str:
    """Where a file is made; the renaming is atomic, and two processes do not write one file."""
    return f"{path}.{os.getpid()}"


def _compile(source: Path, flags: Sequence[str], headers: str, include: Path) -> Path:
    """The object of a source file, which may be there already."""
    key = hashlib.sha256(f"{headers}{flags}{source.read_text()}".encode()).hexdigest()[:16]
    target = CACHE / f"{source.name}-{key}.o"
    if target.exists():
        return target
    places = [f"-I{HERE}", f"-I{build.source_dir()}", "-isystem", str(include)]
    command = ["g++", *COMMON_FLAGS, *flags, *places, "-c", str(source), "-o", _partial(target)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"compiling {source.name} for the emulator failed:\n{result.stderr[-4000:]}")
    return Path(_partial(target)).replace(target)


def build_emulator() -> Path:
    """The library of the emulator, its own test kernels and csrc's; raises RuntimeError with the compiler's words."""
    include = cuda_include()
    assert include is not None, missing()
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:  # one process compiles, and others find the objects
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build(include)


def _build(include: Path) -> Path:
    csrc = build.source_dir()
    header_files = sorted([*HERE.glob("*.h"), *HERE.glob("*.cuh"), *csrc.glob("*.h"), *csrc.glob("*/*.cuh")])
    headers = "".join(file.read_text() for file in header_files) + f"{COMMON_FLAGS}{include}"
    jobs = [(file, KERNEL_FLAGS) for file in sorted([*csrc.glob("*.cu"), *HERE.glob("*.cu")])]
    jobs += [(file, EMULATOR_FLAGS) for file in sorted(HERE.glob("*.cpp"))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(path) for path in pool.map(lambda job: _compile(job[0], job[1], headers, include), jobs)]
    library = CACHE / f"emulator-{hashlib.sha256(''.join(objects).encode()).hexdigest()[:16]}.so"
    if not library.exists():
        subprocess.run(["g++", "-shared", "-o", _partial(library), *objects, "-Wl,-z,defs"], check=True)
        Path(_partial(library)).replace(library)
    return library


def _symbols(path: Path) -> str:
    return subprocess.run(["nm", "-S", "--defined-only", str(path)], capture_output=True, text=True, check=True).stdout


INPUT, IN_OUT, OUTPUT = range(3)


class Library:
    """The loaded emulator: calls its entry points with tensors as pointers."""

    def __init__(self) -> None:
        self._path = build_emulator()
        self._library = ctypes.CDLL(str(self._path))
        self._library.emulator_take_fault.restype = ctypes.c_char_p
        symbols = _symbols(self._path)
        anchor = re.search(r"^(\w+) \w+ T emulator_add_shared$", symbols, re.MULTILINE)
        loaded = ctypes.cast(self._library.emulator_add_shared, ctypes.c_void_p).value
        assert anchor is not None
        assert loaded is not None
        self._base = loaded - int(anchor[1], 16)  # of the library in memory
        # Shared memory: the static locals of kernels.
        for address, size, name in re.findall(r"^(\w+) (\w+) [bd] (_ZZNK?11hf_fastpath\w+)$", symbols, re.MULTILINE):
            label = f"shared memory ({re.sub('.*E[0-9]+', '', name)})"
            self._library.emulator_add_shared(
                label.encode(), ctypes.c_uint64(self._base + int(address, 16)), ctypes.c_int64(int(size, 16))
            )

    def entry(self, name: str) -> Any:
        """The C function of that name."""
        return getattr(self._library, name)

    def call(self, entry: str, *args: Any, **buffers: tuple[torch.Tensor | None, int]) -> None:
        """Runs ``entry(*args)``. Tensors among ``args`` go as pointers; ``buffers`` says what each may be used for."""
        for name, (tensor, kind) in buffers.items():
            if tensor is not None and tensor.numel():
                last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
                self._library.emulator_add_buffer(
                    name.encode(),
                    ctypes.c_void_p(tensor.data_ptr()),
                    ctypes.c_int64((last + 1) * tensor.element_size()),
                    kind,
                )
        try:
            error = self.entry(entry)(*map(_to_c, args))
        finally:
            self._library.emulator_clear_buffers()
        message = self._library.emulator_take_fault().decode()
        if message:
            raise KernelFault(self._with_source(message))
        if error:
            raise KernelFault(f"the launch of {entry} was refused: CUDA error {error}")

    def _with_source(self, message: str) -> str:
        """Replaces "(code at 0x...)" by file and line where binutils can tell."""
        code = re.search(r"\(code at (0x\w+)\)", message)
        if code is None or shutil.which("addr2line") is None:
            return message
        offset = int(code[1], 16) - self._base - 1  # the call, not where it returns to
        command = ["addr2line", "-i", "-s", "-e", str(self._path), hex(offset)]
        lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
        places = [re.sub(r" \(.*", "", line) for line in lines if "?" not in line]
        return message.replace(code[0], f"(at {', inlined at '.join(places)})") if places else message


def _to_c(value: Any) -> Any:
    if value is None or isinstance(value, torch.Tensor):
        return ctypes.c_void_p(None if value is None else value.data_ptr())
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int64(value)


@functools.cache
def library() -> Library:
    """The one of this process: a library that was loaded stays loaded."""
    return Library()
