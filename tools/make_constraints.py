"""Regenerates the pins: installs the project with every extra into a fresh environment and freezes the result.

Run with Python 3.11, the oldest supported:
    python3.11 tools/make_constraints.py
    python3.11 tools/make_constraints.py --transformers 5.17.0 --out .ci/constraints-5.17.txt
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = """\
# Every package that is installed, pinned (a fresh install of .[dev,demo], frozen). torch is installed from it first.
# torch {torch} and transformers {transformers} are choices; the rest is the newest that fits. Regenerate with:
#   python3.11 {command}
"""


def freeze(requirements: list[str]) -> list[str]:
    """``pip freeze`` of a throw-away environment with ``requirements`` in it."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [str(Path(folder, "bin", "python")), "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", *requirements, "-e", f"{ROOT}[dev,demo]"], check=True)
        lines = subprocess.check_output([*pip, "freeze", "--all", "--exclude-editable"], text=True).splitlines()
    # "+cpu" and the like name a build, not a version: another machine gets the build that fits it.
    return [line.split("+")[0] for line in lines if "==" in line and not line.startswith("pip==")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", default="2.13.0")
    parser.add_argument("--transformers", default="5.23.0")
    parser.add_argument("--out", type=Path, default=Path("constraints.txt"), help="relative to the checkout")
    args = parser.parse_args()
    pins = freeze([f"torch=={args.torch}", f"transformers=={args.transformers}", "setuptools>=77"])
    command = " ".join(["tools/make_constraints.py", *sys.argv[1:]])
    header = HEADER.format(torch=args.torch, transformers=args.transformers, command=command)
    (ROOT / args.out).write_text(header + "\n".join(pins) + "\n")
    print(f"{args.out}: {len(pins)} pins")


if __name__ == "__main__":
    main()
