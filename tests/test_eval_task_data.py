"""Benchmarks from local files: what is found, what lm-eval makes of it, and what is refused before anything runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest

from hf_fastpath.eval import task_data
from hf_fastpath.eval.task_data import TaskSource, parse_names, wikitext2_text

SAMPLE = Path(task_data.__file__).with_name("data") / "sample"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A copy of the shipped sample, to spoil."""
    return Path(shutil.copytree(SAMPLE, tmp_path / "data"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def load(folder: Path, scratch: Path, *wanted: tuple[str, int]) -> Any:
    return TaskSource(folder, scratch / "tasks").benchmarks(wanted)


def test_names_and_published_numbers() -> None:
    assert parse_names("hellaswag, mmlu:0,arc_challenge,mmlu_astronomy,piqa") == [
        *(("hellaswag", 10), ("mmlu", 0), ("arc_challenge", 25), ("mmlu_astronomy", 5), ("piqa", 0))
    ]
    assert parse_names("hellaswag,mmlu:2", shots=3) == [("hellaswag", 3), ("mmlu", 2)]
    for text, shots in (("", None), ("mmlu,mmlu:2", None), ("mmlu:five", None), ("mmlu", -1)):
        with pytest.raises(ValueError, match=r"name at least one|name:SHOTS|must be 0 or more"):
            parse_names(text, shots)


def test_local_tasks_are_lm_evals_own(data: Path, tmp_path: Path) -> None:
    wanted = [("hellaswag", 2), ("arc_challenge", 3), ("arc_easy", 1), ("mmlu", 5), ("wikitext", 0)]
    benchmarks, tasks = load(data, tmp_path, *wanted)
    assert [(benchmark.name, benchmark.shots, benchmark.metric) for benchmark in benchmarks] == [
        *(("hellaswag", 2, "acc_norm"), ("arc_challenge", 3, "acc_norm"), ("arc_easy", 1, "acc")),
        *(("mmlu", 5, "acc"), ("wikitext", 0, "acc")),
    ]
    mmlu = benchmarks[3]
    assert len(mmlu.leaves) == 2
    assert (mmlu.limit(None), mmlu.limit(7)) == (None, 4)
    first = tasks["mmlu_world_religions_local"]
    row = json.loads((data / "mmlu/test/world_religions.jsonl").read_text().splitlines()[0])
    shown = first.fewshot_context(first.eval_docs[0], 1)
    assert shown.startswith("The following are multiple choice questions (with answers) about world religions.\n\n")
    choices = "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCD", row["choices"], strict=True))
    assert shown.endswith(f"\n{row['question'].strip()}\n{choices}Answer:")
    assert len(tasks["hellaswag_local"].eval_docs) == 8


@pytest.mark.parametrize(
    ("name", "leaf"),
    [("hellaswag", "hellaswag_local"), ("arc_easy", "arc_easy_local"), ("mmlu", "mmlu_astronomy_local")],
)
def test_a_question_is_never_among_its_own_examples(name: str, leaf: str, data: Path, tmp_path: Path) -> None:
    (data / "mmlu/dev/astronomy.jsonl").unlink()  # examples from the questions themselves
    (data / "mmlu/dev/world_religions.jsonl").unlink()
    _, tasks = load(data, tmp_path, (name, 7))
    task = tasks[leaf]
    task.set_fewshot_seed(seed=0)
    for doc in task.eval_docs:
        asked = task.doc_to_text(doc)
        context = task.fewshot_context(doc, 7)
        assert context.endswith(asked)
        assert context.count(asked) == 1


def test_too_many_examples_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'hellaswag_local' has 7 examples to show, fewer than the 10"):
        load(data, tmp_path, ("hellaswag", 10))


def test_what_is_missing_is_named(data: Path, tmp_path: Path) -> None:
    (data / "arc/ARC-Easy-test.jsonl").unlink()
    with pytest.raises(ValueError, match=r"no task 'arc_easy' .*ARC-Easy-test\.jsonl is missing; there are arc_chall"):
        load(data, tmp_path, ("arc_easy", 0))
    with pytest.raises(ValueError, match="no task 'piqa'"):
        load(data, tmp_path, ("piqa", 0))
    with pytest.raises(ValueError, match="no such folder"):
        load(data / "nowhere", tmp_path, ("mmlu", 0))
    with pytest.raises(ValueError, match=r"cannot read .*wiki\.test\.raw"):
        wikitext2_text(data / "nowhere")


@pytest.mark.parametrize(
    ("path", "line", "message"),
    [
        ("hellaswag/validation.jsonl", '{"ctx": "a"}', "line 9: no column 'activity_label', 'ctx_a'"),
        ("hellaswag/validation.jsonl", "{", "line 9: not JSON"),
        ("arc/ARC-Easy-test.jsonl", '{"question": "q", "choices": ["a"], "answerKey": "A"}', "'choices' is"),
        ("mmlu/test/astronomy.jsonl", '{"question": "q", "choices": ["a"], "answer": 1}', "'choices' is"),
        ("mmlu/dev/astronomy.jsonl", '["a row"]', "no column 'question'"),
    ],
)
def test_wrong_columns_are_named(path: str, line: str, message: str, data: Path, tmp_path: Path) -> None:
    with (data / path).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=message):
        load(data, tmp_path, ("hellaswag", 0), ("arc_easy", 0), ("mmlu", 5))


def test_an_empty_file_is_named(data: Path, tmp_path: Path) -> None:
    (data / "hellaswag/validation.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"validation\.jsonl is empty"):
        load(data, tmp_path, ("hellaswag", 0))


def test_an_unknown_task_of_the_hub_gets_a_hint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no task 'hellaswagg'; did you mean .*hellaswag"):
        TaskSource(None, tmp_path / "tasks").benchmarks([("hellaswagg", 0)])


def test_the_hub_offline_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"cannot load the data of task 'piqa'.*--data-dir"):
        TaskSource(None, tmp_path / "tasks").benchmarks([("piqa", 0)])
