"""lm-eval's model: log-likelihoods against plain arithmetic, and whether the cache is in the loop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from tiny_models import make_llama, make_tokenizer

from hf_fastpath import FastpathConfig, Int4KIVICache, patch_model
from hf_fastpath.config import KVFormat
from hf_fastpath.eval import story_models, task_data
from hf_fastpath.eval.lm import FastpathLM
from hf_fastpath.eval.task_data import TaskSource

SAMPLE = Path(task_data.__file__).with_name("data") / "sample"

# Log-likelihoods are sums of up to 30 log-probabilities that carry 2^7 * 2^-24 = 8e-6 each.
TOLERANCE = 5e-4

Request = tuple[tuple[str, str], list[int], list[int]]


@pytest.fixture
def requests() -> list[Request]:
    """Contexts of very different lengths, several continuations of some, and one token among them."""
    generator = torch.Generator().manual_seed(4)
    made: list[Request] = []
    for number, (context, continuations) in enumerate([(150, (9, 30, 1)), (3, (1, 1, 1)), (90, (4,)), (64, (2, 2))]):
        start = torch.randint(2, 199, (context,), generator=generator).tolist()
        for size in continuations:
            made.append(((f"{number}", ""), start, torch.randint(2, 199, (size,), generator=generator).tolist()))
    return made


def make_lm(kv_cache: str | None = None, **options: Any) -> FastpathLM:
    config = FastpathConfig(weights=None, kv_cache=kv_cache, kv_budget=48, progress=False)  # type: ignore[arg-type]
    model = make_llama() if kv_cache is None else patch_model(make_llama(), config)
    return FastpathLM(model, make_tokenizer(), **options)


def expected(requests: list[Request]) -> list[tuple[float, bool]]:
    """By one forward pass a request, in float64 from the logits on."""
    model, answers = make_llama(), []
    for _, context, continuation in requests:
        with torch.no_grad():
            logits = model(torch.tensor([context + continuation]), use_cache=False).logits[0, len(context) - 1 : -1]
        wanted = torch.tensor(continuation)
        likelihood = logits.double().log_softmax(-1).gather(1, wanted[:, None]).sum().item()
        answers.append((likelihood, torch.equal(logits.argmax(-1), wanted)))
    return answers


@pytest.mark.parametrize("options", [{}, {"kv_chunk": 1}, {"kv_chunk": 5, "batch_size": 4}, {"kv_chunk": 0}], ids=str)
def test_a_full_precision_cache_in_chunks_is_the_plain_forward(requests: list[Request], options: Any) -> None:
    for (likelihood, greedy), (known, greedy_known) in zip(
        make_lm(**options)._loglikelihood_tokens(requests, disable_tqdm=True), expected(requests), strict=True
    ):
        assert likelihood == pytest.approx(known, abs=TOLERANCE)
        assert greedy == greedy_known


@pytest.mark.parametrize("kv_cache", ["int8", "fp8", "int4", "h2o"])
def test_a_quantized_cache_is_in_the_loop(requests: list[Request], kv_cache: str) -> None:
    known = torch.tensor([likelihood for likelihood, _ in expected(requests)])
    in_loop = make_lm(kv_cache)._loglikelihood_tokens(requests, disable_tqdm=True)
    assert (torch.tensor([x for x, _ in in_loop]) - known).abs().max() > 20 * TOLERANCE


def test_a_single_pass_reads_no_quantized_cache(requests: list[Request]) -> None:
    """Why the chunks are there: what HFLM measures of a patched model is the model without its cache."""
    model = patch_model(make_llama(), weights=None, kv_cache="int4", progress=False)
    answers = HFLM(pretrained=model, tokenizer=make_tokenizer())._loglikelihood_tokens(requests, disable_tqdm=True)
    for lm in (make_lm("int4", kv_chunk=0), FastpathLM(model, make_tokenizer(), kv_chunk=0)):
        for (likelihood, _), (known, _) in zip(
            lm._loglikelihood_tokens(requests, disable_tqdm=True), answers, strict=True
        ):
            assert likelihood == pytest.approx(known, abs=TOLERANCE)
    for (likelihood, _), (known, _) in zip(answers, expected(requests), strict=True):
        assert likelihood == pytest.approx(known, abs=TOLERANCE)


def test_a_chunk_of_one_is_decoding(requests: list[Request]) -> None:
    model = make_llama()
    lm = make_lm("int4", kv_chunk=1)
    for request in requests[:4]:
        _, context, continuation = request
        patched, cache, likelihood = lm.model, Int4KIVICache(model.config, fresh_prefill=False), 0.0
        tokens = context + continuation
        with torch.inference_mode():
            for place, token in enumerate(tokens[:-1]):
                logits = patched(input_ids=torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
                if place >= len(context) - 1:
                    likelihood += float(logits.log_softmax(-1)[tokens[place + 1]])
        ((found, _),) = lm._loglikelihood_tokens([request], disable_tqdm=True)
        assert found == pytest.approx(likelihood, abs=1e-4)  # the same arithmetic but for the order of the sum


def test_progress_counts_contexts(requests: list[Request]) -> None:
    calls: list[tuple[int, int]] = []
    lm = make_lm(batch_size=4, on_progress=lambda done, total: calls.append((done, total)))
    lm._loglikelihood_tokens(requests)
    assert calls == [(2, 4), (4, 4)]  # 3 + 1 rows, 2 + 1
    calls.clear()
    lm = make_lm(batch_size=2, kv_chunk=0, on_progress=lambda done, total: calls.append((done, total)))
    lm._loglikelihood_tokens(requests)
    assert calls == [(2, 7), (4, 7), (6, 7), (7, 7)]  # the three continuations of one token share one pass


def test_texts_encoded_together_are_those_encoded_one_by_one() -> None:
    """A context that ends in a space, which lm-eval moves to the continuation, one that is empty, one that begins with
    the token that an empty one is replaced by, and the same pair twice."""
    pairs = [("a b c", " d"), ("a b ", "c"), ("", "d e"), ("[EOS] a", " b"), ("a b c", " e"), ("a b c", " d")]
    asked = [types.SimpleNamespace(args=pair) for pair in pairs]
    known, seen = make_lm(), make_lm(encoded={})
    assert seen.loglikelihood(asked, disable_tqdm=True) == known.loglikelihood(asked, disable_tqdm=True)  # type: ignore[arg-type]
    assert seen.encoded is not None
    assert {*seen.encoded} == {pair for pair in pairs if pair[0]}
    for pair, ids in seen.encoded.items():
        assert ids == known._encode_pair(*pair)
    assert not seen._ids


def test_a_context_too_long_is_cut_on_the_left() -> None:
    model = make_llama(max_position_embeddings=32)
    tokens = torch.randint(2, 199, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    request = [(("", ""), tokens[:-2], tokens[-2:]), (("", ""), tokens[:-2], tokens[-1:])]
    for (own, greedy), (known, known_greedy) in zip(
        FastpathLM(model, make_tokenizer())._loglikelihood_tokens(request, disable_tqdm=True),
        HFLM(pretrained=model, tokenizer=make_tokenizer())._loglikelihood_tokens(request, disable_tqdm=True),
        strict=True,
    ):
        assert own == pytest.approx(known, abs=TOLERANCE)
        assert greedy == known_greedy


def test_registered_under_its_name_and_made_from_a_folder(tmp_path: Path) -> None:
    make_llama(torch.bfloat16).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    text = f"pretrained={tmp_path},dtype=float32,weights=none,kv_cache=int4,kv_chunk=7"
    lm = get_model("hf-fastpath").create_from_arg_string(text, {"batch_size": 3, "device": "cpu"})
    assert isinstance(lm, FastpathLM)
    assert (lm.kv_chunk, lm.batch_size, lm.model.dtype) == (7, 3, torch.float32)
    assert lm.fastpath is not None
    assert (lm.fastpath.weights, lm.fastpath.kv_cache) == (None, KVFormat.INT4)
    assert lm.mode == "decoding through the int4 KV cache, fed 7 tokens at a time"
    assert "not read" in make_lm("int4", kv_chunk=0).mode


@pytest.mark.slow
def test_lm_evals_command_line_runs_it(tmp_path: Path) -> None:
    _, tasks = TaskSource(SAMPLE, tmp_path / "tasks").benchmarks([("hellaswag", 0)])
    (task,) = tasks
    model = f"pretrained={story_models.folder('gpt2')},weights=none,kv_cache=int4,dtype=float32"
    command = [
        sys.executable,
        "-P",
        "-m",
        "hf_fastpath.eval.lm",
        "run",
        "--model",
        "hf-fastpath",
        "--model_args",
        model,
    ]
    command += [
        "--model_args",
        model,
        "--tasks",
        task,
        "--include_path",
        str(tmp_path / "tasks"),
        "--limit",
        "3",
        "--device",
        "cpu",
    ]
    command += ["--output_path", str(tmp_path / "out")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (tmp_path / "out").rglob("results*.json")
    assert "acc_norm,none" in json.loads(path.read_text())["results"][task]


def test_mistakes_are_named() -> None:
    for wrong in (-1, 2.5, "many"):
        with pytest.raises(ValueError, match="kv_chunk="):
            make_lm(kv_chunk=wrong)
    with pytest.raises(ValueError, match="patched already: leave out 'kv_cache'"):
        FastpathLM(make_lm("int8").model, make_tokenizer(), kv_cache="int4")
    with pytest.raises(ValueError, match="allowed are 'static'"):
        FastpathLM(make_llama(), make_tokenizer(), kv_cache="int3")
