"""Which benchmarks are run: lm-eval's tasks by their names, with data from the hub or from a local folder.

A local folder (``--data-dir``) holds, one JSON object a line with the hub's fields::

    hellaswag/validation.jsonl           (and train.jsonl, where few-shot examples are to come from it)
    arc/ARC-Challenge-test.jsonl, arc/ARC-Easy-test.jsonl   (and -train.jsonl)
    mmlu/test/SUBJECT.jsonl, mmlu/dev/SUBJECT.jsonl         any of the 57 subjects
    wikitext2/wiki.test.raw              the text as published, for "wikitext2"
    wikitext2/*pages.jsonl               one page a line, for lm-eval's "wikitext"

Without a split of their own, few-shot examples come from the questions, the one that is asked left out.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hf_fastpath.packing import ceil_div

TEMPLATES = Path(__file__).with_name("data") / "tasks"
WIKITEXT2 = "wikitext2"  # ours: perplexity in windows (eval/wikitext.py)
WIKITEXT2_FILE = Path("wikitext2", "wiki.test.raw")

# Published few-shot numbers and metrics: Hendrycks et al., 2021, for MMLU; the Open LLM Leaderboard for the others.
SHOTS = {"hellaswag": 10, "arc_challenge": 25, "mmlu": 5}
_METRICS = {"hellaswag": "acc_norm", "arc_challenge": "acc_norm"}


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One row of the report: a task of lm-eval, or a group that is counted as one.

    ``leaves``: lm-eval's names of its tasks. ``metric``: the accuracy that is published, ``"acc"`` or ``"acc_norm"``
    (likelihoods a character); tasks without it are reported by their own metrics.
    """

    name: str
    shots: int
    leaves: tuple[str, ...]
    metric: str

    def limit(self, questions: int | None) -> int | None:
        """Questions of each leaf, when all have about so many together."""
        return None if questions is None else ceil_div(questions, len(self.leaves))


@dataclasses.dataclass(frozen=True)
class _Local:
    """The files of a local task, by their splits."""

    template: str
    test: str
    files: dict[str, Path]
    subject: str = ""


def parse_names(text: str, shots: int | None = None) -> list[tuple[str, int]]:
    """``"hellaswag,mmlu:0"``: names and few-shot numbers, ``shots`` or the published ones where none is given.

    Raises:
        ValueError: no name, one twice, or a number that is none.
    """
    wanted: list[tuple[str, int]] = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = item.partition(":")
        if number and not number.isdecimal():
            raise ValueError(f"task {item!r}: write it as name:SHOTS, as in hellaswag:10")
        known = SHOTS.get("mmlu" if name.startswith("mmlu") else name, 0)
        wanted.append((name, int(number) if number else known if shots is None else shots))
    names = [name for name, _ in wanted]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"tasks {text!r}: name at least one, and each once, separated by commas")
    if any(number < 0 for _, number in wanted):
        raise ValueError(f"{shots} few-shot examples: must be 0 or more")
    return wanted


def metric_of(name: str) -> str:
    """The accuracy that is published of a task."""
    return _METRICS.get(name, "acc")


class TaskSource:
    """lm-eval's tasks, from the hub or from ``data_dir``.

    Args:
        data_dir: a local folder, see above; None for the hub (or what is in its local cache).
        folder: a new one for the descriptions of local tasks, which is kept while tasks are loaded.
    """

    def __init__(self, data_dir: Path | None, folder: Path) -> None:
        self.data_dir, self.folder = data_dir, folder
        self._found = _local_tasks(data_dir) if data_dir else {}

    def benchmarks(self, wanted: Iterable[tuple[str, int]]) -> tuple[list[Benchmark], dict[str, Any]]:
        """The benchmarks, and lm-eval's task of each of their leaves, loaded, with its first question formatted.

        Raises:
            ValueError: a name is unknown, a file is missing or lacks columns, or the hub cannot be reached.
        """
        names = [(name, shots) for name, shots in wanted]
        leaves = {name: self._local_leaves(name) for name, _ in names} if self.data_dir else {}
        for local in {leaf: self._found[leaf] for own in leaves.values() for leaf in own}.values():
            for path in local.files.values():
                check_rows(path, _COLUMNS[local.template])
        manager = self._manager({leaf for own in leaves.values() for leaf in own})
        if not self.data_dir:
            for name, _ in names:
                _check_known(name, manager.all_tasks)
        made: list[Benchmark] = []
        tasks: dict[str, Any] = {}
        for name, shots in names:
            loaded = _load(manager, name, [_local_name(leaf) for leaf in leaves[name]] if self.data_dir else [name])
            tasks |= loaded
            made.append(Benchmark(name, shots, tuple(loaded), metric_of(name)))
            for leaf, task in loaded.items():
                _check_shots(leaf, task, shots)
        return made, tasks

    def _local_leaves(self, name: str) -> list[str]:
        assert self.data_dir is not None
        leaves = [leaf for leaf in self._found if leaf == name or (name == "mmlu" and leaf.startswith("mmlu_"))]
        if not leaves:
            known = sorted({"mmlu" if leaf.startswith("mmlu_") else leaf for leaf in self._found} | {WIKITEXT2})
            where = _EXPECTED.get("mmlu" if name.startswith("mmlu_") else name)
            hint = f": {self.data_dir / where} is missing" if where else ""
            raise ValueError(f"no task {name!r} in {self.data_dir}{hint}; there are {', '.join(known)}")
        return leaves

    def _manager(self, leaves: set[str]) -> Any:
        from lm_eval import tasks
        from lm_eval.tasks import TaskManager

        if not self.data_dir:
            return _hub_manager()
        self.folder.mkdir(parents=True, exist_ok=True)
        for leaf in leaves:
            text = _filled(leaf, self._found[leaf], Path(tasks.__file__).parent)
            (self.folder / f"{_local_name(leaf)}.yaml").write_text(text, encoding="utf-8")
        return TaskManager(include_path=str(self.folder), include_defaults=False)


@functools.cache
def _hub_manager() -> Any:
    """lm-eval's own tasks; reading what they are takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def wikitext2_text(data_dir: Path | None) -> str:
    """The WikiText-2 raw test set as papers tokenize it: its rows joined with two newlines.

    Args:
        data_dir: a folder with ``wikitext2/wiki.test.raw``; None for the hub.

    Raises:
        ValueError: it is not there.
    """
    if data_dir is None:
        import datasets

        try:
            rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")["text"]
        except Exception as error:
            raise ValueError(f"cannot load WikiText-2 from the hub ({_first_line(error)}); {_OFFLINE}") from error
        return "\n\n".join(rows)
    path = data_dir / WIKITEXT2_FILE
    try:
        return join_rows(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def join_rows(raw: str) -> str:
    """``wiki.test.raw`` as the hub's rows joined with two newlines: a row is a line with its end, an empty one ""."""
    lines = raw.split("\n")
    if not lines[-1].strip():
        lines.pop()
    return "\n\n".join(f"{line}\n" if line.strip() else "" for line in lines)


_OFFLINE = "offline, give local files with --data-dir (hf_fastpath/eval/task_data.py says which)"
_EXPECTED = {
    "hellaswag": "hellaswag/validation.jsonl",
    "arc_challenge": "arc/ARC-Challenge-test.jsonl",
    "arc_easy": "arc/ARC-Easy-test.jsonl",
    "mmlu": "mmlu/test/SUBJECT.jsonl",
    "wikitext": "wikitext2/*pages.jsonl",
}
Column = Callable[[Any], bool]
_COLUMNS: dict[str, dict[str, Column]] = {
    "hellaswag": {
        "activity_label": lambda x: isinstance(x, str),
        "ctx_a": lambda x: isinstance(x, str),
        "ctx_b": lambda x: isinstance(x, str),
        "endings": lambda x: isinstance(x, list) and len(x) == 4,
        "label": lambda x: str(x) in ("0", "1", "2", "3"),
    },
    "arc": {
        "question": lambda x: isinstance(x, str),
        "choices": lambda x: isinstance(x, dict) and len(x.get("text", ())) == len(x.get("label", ())) > 0,
        "answerKey": lambda x: isinstance(x, str),
    },
    "mmlu": {
        "question": lambda x: isinstance(x, str),
        "choices": lambda x: isinstance(x, list) and len(x) == 4,
        "answer": lambda x: x in (0, 1, 2, 3),
    },
    "wikitext": {"page": lambda x: isinstance(x, str)},
}


def check_rows(path: Path, columns: dict[str, Column]) -> int:
    """The number of rows of a JSON-lines file.

    Raises:
        ValueError: it cannot be read, is empty, or a row lacks a column or holds something else in it.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not lines:
        raise ValueError(f"{path} is empty")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        found = sorted(row) if isinstance(row, dict) else type(row).__name__
        missing = [name for name in columns if not isinstance(row, dict) or name not in row]
        if missing:
            raise ValueError(f"{path}, line {number}: no column {', '.join(map(repr, missing))}, only {found}")
        wrong = [name for name, fits in columns.items() if not fits(row[name])]
        if wrong:
            raise ValueError(f"{path}, line {number}: {wrong[0]!r} is {row[wrong[0]]!r}, not what the task's data hold")
    return len(lines)


def _local_tasks(folder: Path) -> dict[str, _Local]:
    """What a local folder has, by lm-eval's names."""
    if not folder.is_dir():
        raise ValueError(f"--data-dir {folder}: no such folder")

    def splits(asked: str, **paths: str) -> dict[str, Path]:
        files = {split: (folder / path).absolute() for split, path in paths.items()}
        return {split: path for split, path in files.items() if split == asked or path.is_file()}

    found = {
        "hellaswag": _Local(
            "hellaswag",
            "validation",
            splits("validation", validation="hellaswag/validation.jsonl", train="hellaswag/train.jsonl"),
        )
    }
    for name, part in (("arc_challenge", "Challenge"), ("arc_easy", "Easy")):
        files = splits("test", test=f"arc/ARC-{part}-test.jsonl", train=f"arc/ARC-{part}-train.jsonl")
        found[name] = _Local("arc", "test", files)
    for path in sorted(folder.glob("mmlu/test/*.jsonl")):
        files = splits("test", test=f"mmlu/test/{path.name}", dev=f"mmlu/dev/{path.name}")
        found[f"mmlu_{path.stem}"] = _Local("mmlu", "test", files, path.stem.replace("_", " "))
    for path in sorted(folder.glob("wikitext2/*pages.jsonl"))[:1]:
        found["wikitext"] = _Local("wikitext", "test", {"test": path.absolute()})
    return {name: local for name, local in found.items() if local.files[local.test].is_file()}


def _local_name(leaf: str) -> str:
    """Another name than lm-eval's own task has."""
    return f"{leaf}_local"


def _filled(leaf: str, local: _Local, tasks: Path) -> str:
    """A local task's description."""
    text = (TEMPLATES / f"{local.template}.yaml").read_text(encoding="utf-8")
    shots = next((split for split in ("train", "dev") if split in local.files), local.test)
    values = {
        "lm_eval": str(tasks),
        "task": _local_name(leaf),
        "subject": local.subject,
        "data_files": json.dumps({split: str(path) for split, path in local.files.items()}),
        "fewshot_split": shots,
    }
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def _check_known(name: str, known: list[str]) -> None:
    if name in known:
        return
    near = difflib.get_close_matches(name, [*known, WIKITEXT2], n=3)
    hint = f"; did you mean {', '.join(near)}?" if near else f"; lm-eval has {len(known)} tasks (lm-eval ls tasks)"
    raise ValueError(f"lm-eval has no task {name!r}{hint}")


def _load(manager: Any, name: str, specs: list[str]) -> dict[str, Any]:
    try:
        return dict(manager.load(specs)["tasks"])
    except Exception as error:  # of datasets and huggingface_hub, of many kinds
        raise ValueError(f"cannot load the data of task {name!r} ({_first_line(error)}); {_OFFLINE}") from error


def _check_shots(leaf: str, task: Any, shots: int) -> None:
    if not shots:
        return
    sampler = getattr(task, "sampler", None)
    pool = len(sampler.fewshot_docs()) if sampler is not None else 0
    shared = task.fewshot_cfg.split is not None and task.fewshot_cfg.split == task.config.test_split
    if pool - shared < shots:
        raise ValueError(f"task {leaf!r} has {pool - shared} examples to show, fewer than the {shots} asked for")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
