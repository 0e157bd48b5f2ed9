"""Builds and loads the CUDA kernels: one ``.so`` from ``csrc/``, by ninja and nvcc, on torch's stable ABI.

The library is looked for in this order: ``_kernels.so`` inside the installed package (a wheel built with nvcc); the
user's cache folder; a build into that folder, under a lock. Importing this module does nothing, and it imports neither
torch nor the rest of the package, since setup.py uses it too.

Environment: ``HF_FASTPATH_CUDA_ARCHS`` ("80;90a", "89+PTX"), ``HF_FASTPATH_CACHE`` (the cache folder),
``HF_FASTPATH_NO_BUILD=1`` (never compile), ``CUDA_HOME``, ``MAX_JOBS`` (parallel compilers).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIBRARY_NAME = "_kernels.so"
# What wheels carry; PTX serves the GPUs that came after. A first-use build makes only what the machine has.
WHEEL_ARCHS = ("80", "86", "89+PTX", "90a")
MIN_CAPABILITY = (8, 0)
MIN_TORCH = (2, 11)
TORCH_TARGET = "0x020b000000000000"  # the oldest torch whose stable ABI the library uses: 2.11
NVCC_HINT = "install the CUDA toolkit 12.8 or newer, or set CUDA_HOME to where it is"
COMPILE_FLAGS = (
    "-std=c++17",
    "-O3",
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden",
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
)
# libtorch.so is what brings in libtorch_cuda, and with it the stream function that ops_checks.h declares weak.
LINK_FLAGS = ("-shared", "-cudart", "static", "-Xlinker", "--no-as-needed", "-ltorch")
ERROR_LINES = 40


def find_nvcc() -> Path | None:
    """nvcc from ``CUDA_HOME``, ``PATH`` or ``/usr/local/cuda``; None when there is none."""
    home = os.environ.get("CUDA_HOME")
    candidates = [Path(home, "bin", "nvcc")] if home else []
    on_path = shutil.which("nvcc")
    if on_path:
        candidates.append(Path(on_path))
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def find_ninja() -> Path | None:
    """ninja from the PyPI package of that name or ``PATH``; None when there is none."""
    if importlib.util.find_spec("ninja") is not None:
        import ninja

        packaged = Path(ninja.BIN_DIR, "ninja")
        if packaged.exists():
            return packaged
    on_path = shutil.which("ninja")
    return Path(on_path) if on_path else None


def source_dir() -> Path:
    """The folder of the CUDA sources: ``hf_fastpath/csrc`` when installed, ``csrc`` beside the package in a checkout.

    Raises RuntimeError when neither is there.
    """
    package = Path(__file__).parent
    for folder in (package / "csrc", package.parent / "csrc", package.resolve().parent / "csrc"):
        if (folder / "kernels.h").exists():
            return folder
    raise RuntimeError(f"the CUDA sources are missing: no csrc/kernels.h in or beside {package}; reinstall hf-fastpath")


def cuda_arch_list(*, present_only: bool = False) -> tuple[str, ...]:
    """Architectures to compile for, as nvcc numbers them ("80", "90a"); "+PTX" adds code for later GPUs.

    ``HF_FASTPATH_CUDA_ARCHS`` decides when it is set; else, with ``present_only`` and a GPU in this machine, the
    architectures of its GPUs; else :data:`WHEEL_ARCHS`. Raises ValueError for a name that is not an architecture.
    """
    wanted = os.environ.get("HF_FASTPATH_CUDA_ARCHS", "").replace(",", ";")
    names = tuple(name.strip() for name in wanted.split(";") if name.strip())
    for name in names:
        if not re.fullmatch(r"\d{2,3}[af]?(\+PTX)?", name):
            raise ValueError(f'HF_FASTPATH_CUDA_ARCHS: {name!r} is no architecture; write for example "80;90a"')
    if names:
        return names
    return (_present_archs() if present_only else ()) or WHEEL_ARCHS


def _present_archs() -> tuple[str, ...]:
    import torch

    if not torch.cuda.is_available():
        return ()
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    supported = sorted(capability for capability in capabilities if capability >= MIN_CAPABILITY)
    return tuple("90a" if capability == (9, 0) else "{}{}".format(*capability) for capability in supported)


def _gencode(arch: str) -> str:
    number, plus, _ = arch.partition("+")
    code = f"[sm_{number},compute_{number}]" if plus else f"sm_{number}"
    return f"-gencode=arch=compute_{number},code={code}"


def _torch_dir() -> Path:
    """Where torch is installed, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("torch is not installed: its headers are needed to compile the kernels")
    return Path(next(iter(spec.submodule_search_locations)))


def _ninja_file(nvcc: Path, sources: Path, objects: Path, output: Path, archs: Sequence[str]) -> str:
    """The text of build.ninja: one object a source file, one library."""

    def command(*words: str) -> str:
        return shlex.join([str(nvcc), *words]).replace("$", "$$")

    def escape(path: Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(path))

    torch_dir = _torch_dir()
    codes = [_gencode(arch) for arch in archs]
    files = sorted([*sources.glob("*.cu"), *sources.glob("*.cpp")])
    targets = [objects / f"{file.name}.o" for file in files]
    lines = [
        "rule compile",
        f"  command = {command(*COMPILE_FLAGS, *codes, f'-I{torch_dir}/include')} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {command(f'-L{torch_dir}/lib')} $in {shlex.join(LINK_FLAGS)} -o $out",
    ]
    lines += [f"build {escape(target)}: compile {escape(file)}" for file, target in zip(files, targets, strict=True)]
    lines.append(f"build {escape(output)}: link {' '.join(map(escape, targets))}")
    return "\n".join(lines) + "\n"


def _run_ninja(ninja: Path, folder: Path, progress: bool) -> None:
    """Runs ninja in ``folder``; raises RuntimeError with the end of its output when a command fails."""
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    environment = {**os.environ, "NINJA_STATUS": "[%f/%t] "}
    output: list[str] = []
    bar = None
    with subprocess.Popen(
        [str(ninja), "-C", str(folder), "-j", jobs],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            step = re.match(r"\[(\d+)/(\d+)\] ", line)
            if step and progress:
                bar = bar or _progress_bar(int(step[2]))
                bar.n = int(step[1])
                bar.refresh()
            if not step:  # a step's line holds its whole command; what a failing compiler says follows it
                output.append(line)
    if bar:
        bar.close()
    if process.returncode:
        tail = "".join(output[-ERROR_LINES:]).strip()
        raise RuntimeError(
            f"compiling the CUDA kernels failed:\n{tail}\n"
            f"`{ninja} -C {folder}` repeats it. The kernels need the CUDA toolkit 12.8 or newer and a C++ compiler "
            "that it supports; HF_FASTPATH_CUDA_ARCHS chooses the architectures."
        )


def _progress_bar(steps: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=steps, desc="hf_fastpath: compiling CUDA kernels (once)", unit="file")


def build_library(
    output: Path,
    archs: Sequence[str],
    *,
    progress: bool,
    folder: Path | None = None,
    sources: Path | None = None,
) -> Path:
    """Compiles ``csrc/`` for ``archs`` into ``output``, which appears only when complete; returns it.

    ``folder`` keeps the objects, so that a later build there compiles only what changed (default: beside ``output``,
    removed afterwards). ``sources`` replaces the package's own.

    Raises RuntimeError when nvcc, ninja or torch is missing or a command fails; the message holds the end of the
    compiler's output.
    """
    nvcc, ninja = find_nvcc(), find_ninja()
    if nvcc is None:
        raise RuntimeError(f"no nvcc: {NVCC_HINT}")
    if ninja is None:
        raise RuntimeError("no ninja: pip install ninja")
    output = output.absolute()
    objects = folder.absolute() if folder else output.parent / f"{output.name}.build"
    objects.mkdir(parents=True, exist_ok=True)
    built = objects / LIBRARY_NAME
    (objects / "build.ninja").write_text(_ninja_file(nvcc, sources or source_dir(), objects, built, archs))
    _run_ninja(ninja, objects, progress)
    partial = output.with_name(f".{output.name}.{os.getpid()}")  # same folder: the rename is atomic
    output.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(built, partial)
    partial.replace(output)
    if folder is None:
        shutil.rmtree(objects)
    return output


def cache_dir() -> Path:
    """``HF_FASTPATH_CACHE``, else ``hf_fastpath`` in the user's cache folder."""
    own = os.environ.get("HF_FASTPATH_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "hf_fastpath")


@functools.cache
def _nvcc_version(nvcc: Path) -> str:
    try:
        text = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise RuntimeError(f"{nvcc} does not run ({error}): {NVCC_HINT}") from error
    return text.strip().splitlines()[-1]


def _hash(*parts: bytes | str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]


def _flags_key(nvcc: Path, archs: Sequence[str]) -> str:
    return _hash(_nvcc_version(nvcc), *COMPILE_FLAGS, *LINK_FLAGS, *archs)


def _sources_key(sources: Path) -> str:
    files = sorted(path for path in sources.rglob("*") if path.suffix in {".cu", ".cuh", ".cpp", ".h"})
    return _hash(*(part for file in files for part in (str(file.relative_to(sources)), file.read_bytes())))


def library_path() -> Path | None:
    """The library that would be loaded now: the wheel's, or a cached build that fits; None when there is neither."""
    packaged = Path(__file__).parent / LIBRARY_NAME
    if packaged.exists():
        return packaged
    cached = _cached_path()
    return cached if cached is not None and cached.exists() else None


def _cached_path() -> Path | None:
    nvcc = find_nvcc()
    if nvcc is None:
        return None
    key = f"{_flags_key(nvcc, cuda_arch_list(present_only=True))}-{_sources_key(source_dir())}"
    return cache_dir() / key / LIBRARY_NAME


def ensure_library(*, progress: bool = True) -> Path:
    """:func:`library_path`, built first if need be; two processes that need it at once build it once.

    Raises RuntimeError when it is not there and cannot be built; the message says what to do.
    """
    from filelock import FileLock

    found = library_path()
    if found:
        return found
    target, nvcc = _cached_path(), find_nvcc()
    if target is None or nvcc is None:
        raise RuntimeError(f"no nvcc: {NVCC_HINT}")
    if os.environ.get("HF_FASTPATH_NO_BUILD", "0") not in ("", "0"):
        raise RuntimeError(f"HF_FASTPATH_NO_BUILD is set and there is no built library at {target}")
    archs = cuda_arch_list(present_only=True)
    folder = cache_dir() / f"build-{_flags_key(nvcc, archs)}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not target.exists():  # another process may have built it while this one waited
            build_library(target, archs, progress=progress, folder=folder)
    return target


@dataclass(frozen=True)
class LoadResult:
    """Whether the CUDA kernels are in this process, from which file, and in words why or why not."""

    loaded: bool
    path: Path | None
    reason: str


_load_lock = threading.Lock()
_load_results: dict[bool, LoadResult] = {}


def load_library(*, force: bool = False, progress: bool = True) -> LoadResult:
    """Adds the CUDA implementations to the ops, building them first if need be. Never raises for what a machine lacks.

    Works once a process: later calls return the first call's result. Without a CUDA GPU it does nothing, unless
    ``force``, which is for testing that the library loads.
    """
    with _load_lock:
        loaded = next((result for result in _load_results.values() if result.loaded), None)
        if loaded is None and force not in _load_results:
            _load_results[force] = _load(force, progress)
        return loaded or _load_results[force]


def _load(force: bool, progress: bool) -> LoadResult:
    import torch

    missing = _unsupported(torch, force)
    if missing:
        return LoadResult(False, None, missing)
    import hf_fastpath.ops  # noqa: F401  (defines the ops that the library implements)

    try:
        path = ensure_library(progress=progress)
        torch.ops.load_library(str(path))
    except (RuntimeError, OSError, ValueError) as error:
        return LoadResult(False, None, str(error))
    return LoadResult(True, path, f"loaded {path}")


def _unsupported(torch: Any, force: bool) -> str:
    """Why this torch or machine cannot use the library; empty when it can."""
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < MIN_TORCH:
        return f"torch {torch.__version__} is too old: the kernels need torch 2.11 or newer"
    if force:
        return ""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install a CUDA build of torch"
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU: check nvidia-smi, the driver and CUDA_VISIBLE_DEVICES"
    capabilities = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    if max(capabilities) < MIN_CAPABILITY:
        return "no GPU has compute capability 8.0 (Ampere) or newer: the kernels use its tensor-core instructions"
    return ""
