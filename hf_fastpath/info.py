"""What is on this machine, what runs where, and what to do about what is missing."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path

import torch

import hf_fastpath
from hf_fastpath import build, ops

TRANSFORMERS_TESTED = ((5, 17), (5, 23))


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing looked for. ``advice`` says what to do when it is missing; empty when there is nothing to do."""

    name: str
    value: str
    advice: str = ""


@dataclasses.dataclass(frozen=True)
class OpPlacement:
    """Where an op runs here."""

    op: str
    cpu: str
    cuda: str


def cpu_name() -> str:
    """The processor's model name."""
    try:
        match = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1] if match else platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Versions that a number should name."""
    return {
        "hf_fastpath": hf_fastpath.__version__,
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "python": platform.python_version(),
    }


def findings() -> list[Finding]:
    """Everything looked for, found or not. Builds nothing."""
    driver = _driver()
    return [
        Finding("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        _torch(driver.advice == ""),
        _transformers(),
        Finding("CPU", f"{cpu_name()}, {torch.get_num_threads()} threads"),
        *_gpus(),
        driver,
        _nvcc(),
        _ninja(),
        _library(),
        Finding("cache folder", str(build.cache_dir())),
    ]


def _torch(has_driver: bool) -> Finding:
    cuda = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
    useless = has_driver and torch.version.cuda is None
    advice = "to use the GPU, install a CUDA build of torch 2.11 or newer" if useless else ""
    return Finding("torch", f"{torch.__version__}, {cuda}", advice)


def _transformers() -> Finding:
    version = importlib.metadata.version("transformers")
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    oldest, newest = TRANSFORMERS_TESTED
    supported = "{}.{} to {}.{}".format(*oldest, *newest)
    if oldest <= numbers <= newest:
        return Finding("transformers", f"{version}, supported ({supported})")
    advice = f"tested with {supported}: install one of these if something fails"
    return Finding("transformers", f"{version}, outside the tested range", advice)


def _gpus() -> list[Finding]:
    if not torch.cuda.is_available():
        return [Finding("GPU", "none that torch can use", "nothing to do: everything runs on the CPU")]
    found = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        old = (major, minor) < build.MIN_CAPABILITY
        advice = "the kernels need compute capability 8.0 (Ampere) or newer" if old else ""
        found.append(Finding("GPU", f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}", advice))
    return found


def _driver() -> Finding:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        version = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return Finding("NVIDIA driver", "not found", "needed for a GPU only")
    return Finding("NVIDIA driver", version)


def _nvcc() -> Finding:
    nvcc = build.find_nvcc()
    if nvcc is None:
        return Finding("nvcc", "not found", f"needed to build the GPU kernels: {build.NVCC_HINT}")
    try:
        text = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("nvcc", f"{nvcc} does not run: {error}", build.NVCC_HINT)
    release = re.search(r"release ([\d.]+)", text)
    return Finding("nvcc", f"{nvcc}, release {release[1] if release else 'unknown'}")


def _ninja() -> Finding:
    ninja = build.find_ninja()
    return Finding("ninja", str(ninja)) if ninja else Finding("ninja", "not found", "pip install ninja")


def _library_path() -> tuple[Path | None, str]:
    """The built library if there is one, and what stands in the way of looking for it."""
    try:
        return build.library_path(), ""
    except (RuntimeError, ValueError) as error:
        return None, str(error)


def _library() -> Finding:
    path, problem = _library_path()
    if problem:
        return Finding("kernel library", "not found", problem)
    if path is None:
        can_build = build.find_nvcc() is not None and build.find_ninja() is not None
        advice = "it is built at the first use of a GPU" if can_build else "see nvcc and ninja above"
        return Finding("kernel library", "not built yet", advice)
    value = f"{path}, for {', '.join(library_archs(path)) or 'unknown architectures'}"
    if not torch.cuda.is_available():
        return Finding("kernel library", f"{value}; not loaded, as there is no GPU")
    result = build.load_library()
    if not result.loaded:
        return Finding("kernel library", f"{value}; does not load", result.reason)
    return Finding("kernel library", f"{value}; loaded")


def library_archs(path: Path) -> list[str]:
    """GPU architectures (``sm_90a``) that a library holds code for, from the compiler options recorded beside the code.

    Options with ``-l`` are those of the linking step, which names an architecture of its own.
    """
    names = set(re.findall(rb"-arch (sm_\d+[af]?) -m 64 (?!-l)", path.read_bytes()))
    return sorted(name.decode() for name in names)


def placements() -> list[OpPlacement]:
    """Where each op runs. Does not load or build the kernels."""
    if not torch.cuda.is_available():
        cuda = "no GPU"
    elif _library_path()[0] is not None:
        cuda = "CUDA kernel"
    else:
        cuda = "CUDA kernel, once built"

    return [OpPlacement(name, _CPU_PATHS.get(name, "reference"), cuda) for name in ops.SCHEMAS]


# W4A16Linear does not call the op on the CPU: torch's int4 product is many times faster than the reference.
_CPU_PATHS = {"w4a16_linear": "torch's int4 product; the op itself: reference"}
