"""What the repository promises about itself: what imports what, what an import changes, what its documents say."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_fastpath
from hf_fastpath import FastpathConfig, cli
from hf_fastpath.generation import CACHES
from hf_fastpath.patches import RECIPES

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")


def tracked_files() -> list[Path]:
    """Every text file of the project: git's list where there is one, else all but what the .gitignore names."""
    listing = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode == 0:
        return [ROOT / line for line in listing.stdout.splitlines() if (ROOT / line).is_file()]
    ignored = {"build", "dist", "__pycache__"}
    files = (path for path in ROOT.rglob("*") if path.is_file() and path.suffix not in {".pyc", ".so", ".o"})
    return [
        path
        for path in files
        if not any(part in ignored or (part.startswith(".") and part != ".ci") for part in path.relative_to(ROOT).parts)
    ]


def imports(path: Path) -> Iterator[str]:
    """Names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_transformers_is_imported_only_where_it_may_be() -> None:
    allowed = ("hf_fastpath/caches/", "hf_fastpath/generation.py", "hf_fastpath/cli.py")
    allowed += ("hf_fastpath/quantizer.py", "hf_fastpath/saving.py")
    for path in (ROOT / "hf_fastpath").rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        uses = [module for module in imports(path) if module.split(".")[0] == "transformers"]
        assert not uses or name.startswith(allowed), f"{name} imports {uses}"


def test_layers_depend_one_way() -> None:
    """patching -> patches -> modules, caches -> ops, and none of these needs the command line or the evaluation."""
    below = {
        "ops": ("modules", "caches", "patches", "patching", "generation", "eval", "cli"),
        "modules": ("patches", "patching", "generation", "eval", "cli"),
        "caches": ("patches", "patching", "generation", "eval", "cli"),
        "checkpoints": ("ops", "modules", "caches", "patches", "patching", "generation", "eval", "cli"),
    }
    for folder, forbidden in below.items():
        for path in (ROOT / "hf_fastpath" / folder).glob("*.py"):
            for module in imports(path):
                layer = module.removeprefix("hf_fastpath.").split(".")[0]
                assert not (module.startswith("hf_fastpath.") and layer in forbidden), f"{path.name} imports {module}"


def test_importing_changes_nothing() -> None:
    """Run in a fresh interpreter: everything global that the package could touch, before and after."""
    script = """
import json, os, sys, torch
from transformers import AttentionInterface, AttentionMaskInterface, GenerationMixin
from transformers.generation import configuration_utils
def state():
    return {
        "attention": sorted(AttentionInterface().keys()),
        "masks": sorted(AttentionMaskInterface().keys()),
        "caches": sorted(map(str, configuration_utils.ALL_CACHE_IMPLEMENTATIONS)),
        "prepare": id(GenerationMixin._prepare_cache_for_generation),
        "environment": sorted(os.environ.items()),
        "torch": [torch.get_num_threads(), str(torch.get_default_dtype()), torch.is_grad_enabled(),
                  torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()],
    }
before = state()
import hf_fastpath
unwanted = [m for m in ("hf_fastpath.cli", "hf_fastpath.eval", "hf_fastpath.info", "gguf", "pytest")
            if m in sys.modules]
print(json.dumps([before, state(), unwanted]))
"""
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    before, after, unwanted = json.loads(result.stdout)
    assert after == before
    assert unwanted == []


def test_the_public_names_are_there_and_documented() -> None:
    for name in hf_fastpath.__all__:
        assert getattr(hf_fastpath, name).__doc__, f"{name} has no docstring"
    caches = [cache.__name__ for cache in CACHES.values()]
    for name in ("patch_model", "unpatch_model", "fastpath_report", "FastpathConfig", *caches):
        assert name in hf_fastpath.__all__
        assert name in README
    for kv_format in CACHES:
        assert re.search(rf'^\| `"{kv_format.value}"` \| `{CACHES[kv_format].__name__}` \|', README, re.MULTILINE)


def test_one_version() -> None:
    assert PROJECT["version"] == hf_fastpath.__version__
    assert f"## [{hf_fastpath.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("file", ["constraints.txt", ".ci/constraints-5.17.txt"])
def test_everything_installed_is_pinned(file: str) -> None:
    pins = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", pin) for pin in pins)
    pinned = {re.sub(r"[._-]+", "-", pin.split("==")[0].lower()) for pin in pins}
    extras = PROJECT["optional-dependencies"]
    for requirement in (*PROJECT["dependencies"], *extras["dev"], *extras["demo"], "setuptools"):
        name = re.split(r"[<>=;\[ ]", requirement)[0].lower()
        assert name in pinned, f"{name} is not pinned in {file}"


def test_no_file_names_a_machine_or_an_index() -> None:
    # Assembled, so that this file does not match itself.
    folders = "|".join(("home", "root", "Users", "t" + "mp", "work", "opt"))
    machine_path = re.compile(rf"(?<![\w.~$}}-])/(?:{folders})/\w+")
    index = re.compile("--(?:extra-)?" + "index-url|--find" + "-links")
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for pattern in (machine_path, index):
            found = pattern.search(text)
            assert found is None, f"{path.relative_to(ROOT)} names {found and found[0]!r}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_snippets_use_names_that_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for snippet in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(snippet)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "hf_fastpath":
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{document}: {node.module} has no {alias.name}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                check_options(document, node)


def check_options(document: str, call: ast.Call) -> None:
    """Options of patch_model and FastpathConfig in a snippet are fields of the configuration, with allowed values."""
    if not isinstance(call.func, ast.Name) or call.func.id not in ("patch_model", "FastpathConfig"):
        return
    options = {
        option.arg: option.value for option in call.keywords if option.arg not in (None, "config", "calibration")
    }
    known = {field.name for field in dataclasses.fields(FastpathConfig)}
    assert set(options) <= known, f"{document}: {set(options) - known}"
    FastpathConfig(**{name: ast.literal_eval(value) for name, value in options.items()})


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_files_commands_and_targets_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)(?=[`\n ]*)", "\n".join(code_in(text)))) <= targets
    commands = {command.name or command.callback.__name__ for command in cli.app.registered_commands}  # type: ignore[union-attr]
    commands |= {group.name for group in cli.app.registered_groups}
    assert set(re.findall(r"hf-fastpath ([a-z]+)", "\n".join(code_in(text)))) <= commands
    for name in re.findall(r"`((?:hf_fastpath|csrc|patches|eval|tests|tools)/[\w./-]*)`", text):
        assert (ROOT / name).exists(), f"{document} names {name}"


def code_in(text: str) -> list[str]:
    """The code of a Markdown text: fenced blocks and `inline`."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return fenced + re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def test_the_readme_lists_every_option_and_family() -> None:
    for field in dataclasses.fields(FastpathConfig):
        assert re.search(rf"^\| `{field.name}` \|", README, re.MULTILINE), f"README.md: no row for {field.name}"
    for recipe in RECIPES:
        for kind in recipe.model_classes:
            assert kind.__name__ in README


def test_kernels_read_what_kernels_store_by_ordinary_loads() -> None:
    """ptxas moves a read-only load above the wait for the kernel before; weights alone may be read so."""
    found = [
        line.strip()
        for path in sorted((ROOT / "csrc").rglob("*.cu*"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"__ldg\(|__restrict__|ld\.global(\.\w+)*\.nc", line)
    ]
    assert found == ['asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"']
    assert "ld.global.nc" in (ROOT / "csrc/common/ptx.cuh").read_text().split("load_once16")[1].split("}")[0]


@pytest.mark.parametrize("path", sorted([*ROOT.glob("tests/gpu/*.py"), *ROOT.glob("eval/*.py")]), ids=lambda p: p.name)
def test_other_streams_wait_for_what_they_read(path: Path) -> None:
    """A stream that does not wait reads inputs that are not there yet: of a list of experts, any number."""
    for function in ast.parse(path.read_text()).body:
        source = ast.unparse(function)
        before, entered, _ = source.partition("with torch.cuda.stream(")
        assert not entered or re.search(r"\.wait_stream\(|synchronize\(", before), source.splitlines()[0]


def test_a_wheel_has_every_source_and_every_data_file() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    carried = {
        path
        for folder in ("csrc", "eval")
        for pattern in patterns[f"hf_fastpath.{folder}"]
        for path in (ROOT / folder).glob(pattern)
    }
    wanted = {path for path in tracked_files() if path.is_relative_to(ROOT / "csrc") and path.suffix != ".py"}
    wanted |= {path for path in tracked_files() if path.is_relative_to(ROOT / "eval/data")}
    assert wanted
    assert wanted - carried == set()
