"""Calibration: where its tokens come from, what is refused, and what it does to a model."""

from __future__ import annotations

import types
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import fingerprint, logits, make_llama
from torch import nn

from hf_fastpath import blockwise, patch_model
from hf_fastpath.calibration import calibration_tokens, check_tokens, self_written_tokens
from hf_fastpath.modules import W4A16Linear

QUIET = {"progress": False, "kv_cache": None}


def tokenizer(text: str, add_special_tokens: bool = True) -> Any:
    """One token a character, and a first token that calibration must not ask for."""
    return types.SimpleNamespace(input_ids=[1] * add_special_tokens + [ord(letter) % 199 for letter in text])


def spread_inputs(model: Any) -> Any:
    """Some channels strongly driven, as in trained models."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[::16] = 8.0
            layer.post_attention_layernorm.weight[::16] = 8.0
    return model


def test_sequences_are_spread_over_the_text(tmp_path: Path) -> None:
    text = "".join(chr(33 + i % 150) for i in range(10_000))
    file = tmp_path / "text.txt"
    file.write_text(text, encoding="utf-8")
    tokens = calibration_tokens(tokenizer, file, sequences=4, length=8)
    assert tokens.shape == (4, 8)
    assert tokens.dtype == torch.int64
    everything = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    assert torch.equal(tokens[0], everything[:8])
    assert torch.equal(tokens[-1], everything[-8:])
    starts = [int(row[0]) for row in tokens]
    assert len(set(starts)) == 4


def test_strings_and_data_sets_are_the_same_text() -> None:
    rows = ["first row of text", "second row of text"]
    expected = calibration_tokens(tokenizer, rows, sequences=2, length=6)

    class DataSet(dict):
        column_names = ("id", "text")

    assert torch.equal(calibration_tokens(tokenizer, DataSet(id=[1, 2], text=rows), sequences=2, length=6), expected)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/file.txt", "cannot read the calibration text 'no/such/file.txt'"),
        (["too short"], "holds 9 tokens, and 64 sequences of 256 need 16,384"),
        ([1, 2], "strings or a data set of them, got int"),
        (types.SimpleNamespace(column_names=["content"]), "no column 'text', only 'content'"),
        (3.5, "got float"),
    ],
)
def test_bad_texts_are_named(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibration_tokens(tokenizer, source)


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "data.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot read the calibration text"):
        calibration_tokens(tokenizer, tmp_path / "data.bin")
    with pytest.raises(ValueError, match="sequences=0"):
        calibration_tokens(tokenizer, ["text"], sequences=0)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (torch.zeros(2, 5), r"integers \(n, T\)"),
        (torch.zeros(5, dtype=torch.long), r"of shape \(5,\)"),
        (torch.zeros((2, 1), dtype=torch.long), "T >= 2"),
        (torch.full((2, 5), 199), "from 199 to 199: the model has 0 to 198"),
        ([[1, 2, 3], [1, 2]], "n sequences of one length"),
        ("a text", "n sequences of one length"),
        ([], "n sequences of one length"),
    ],
)
def test_bad_tokens_are_named_and_nothing_is_touched(calibration: Any, message: str) -> None:
    model = make_llama()
    state = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        patch_model(model, calibration=calibration, **QUIET)
    assert fingerprint(model) == state


@pytest.mark.parametrize("overrides", [{"scale_search": "absmax"}, {"weights": None}])
def test_calibration_that_nothing_would_read_is_refused(overrides: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="scale_search='output'"):
        patch_model(make_llama(), calibration=torch.zeros((2, 5), dtype=torch.long), **QUIET, **overrides)


def test_rows_of_tokens_are_a_tensor() -> None:
    assert torch.equal(check_tokens([[1, 2], [3, 4]], 10), torch.tensor([[1, 2], [3, 4]]))


def test_calibration_lessens_the_error_on_its_text_and_on_more_of_it() -> None:
    """Sequences over a few of the tokens, so that what is correlated in them is not so in random ones."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(2, 12, (48, 32), generator=generator)
    seen, unseen = ids[:40], ids[40:]
    errors: dict[str, float] = {"absmax": 0.0, "activation": 0.0, "output": 0.0}
    for seed, search in ((s, name) for s in range(3) for name in errors):
        model = spread_inputs(make_llama(seed=seed, initializer_range=0.05))
        before = logits(model, unseen)
        calibration = seen if search == "output" else None
        patch_model(model, scale_search=search, zero_points=False, calibration=calibration, **QUIET)
        errors[search] += float((logits(model, unseen) - before).square().mean() / before.square().mean())
    assert errors["output"] < 0.8 * errors["activation"]
    assert errors["output"] < 0.6 * errors["absmax"]


def test_text_of_its_own_is_better_than_plain_rounding() -> None:
    ids = self_written_tokens(make_llama(initializer_range=0.05), sequences=8, length=32)
    errors = {"absmax": 0.0, "output": 0.0}
    for search in errors:
        model = spread_inputs(make_llama(initializer_range=0.05))
        before = logits(model, ids)
        patch_model(model, scale_search=search, zero_points=False, **QUIET)
        errors[search] = float((logits(model, ids) - before).square().mean())
    assert errors["output"] < 0.7 * errors["absmax"]


def test_self_written_text_is_the_models_and_always_the_same() -> None:
    model = make_llama(attention_dropout=0.5).train()
    state = fingerprint(model)
    tokens = self_written_tokens(model, sequences=64, length=6)
    assert fingerprint(model) == state
    assert torch.equal(tokens, self_written_tokens(model, sequences=64, length=6))
    assert tokens.shape == (64, 6)
    assert bool((tokens[:, 0] == 1).all())  # the first token of its configuration
    likelihood = logits(model.eval(), torch.tensor([[1]]))[0, -1].softmax(-1)
    seen = likelihood[tokens[:, 1]].mean()
    # Sampled tokens have the likelihood sum(p^2) on average, uniform ones 1/199.
    assert float(seen) == pytest.approx(float(likelihood.square().sum()), rel=0.5)
    assert float(seen) > 2 / 199


def test_a_model_without_a_first_token_starts_anywhere() -> None:
    tokens = self_written_tokens(make_llama(bos_token_id=None), sequences=16, length=3)
    assert len(set(tokens[:, 0].tolist())) > 8


def test_layers_are_measured_behind_int4_ones_and_freed_as_they_go(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama(num_hidden_layers=3)
    originals = [weakref.ref(m.weight) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    seen: list[tuple[int, int, tuple[int, ...]]] = []
    quantize = blockwise.quantize_with_feedback

    def counting(weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        packed = sum(isinstance(module, W4A16Linear) for module in model.modules())
        seen.append((sum(ref() is not None for ref in originals), packed, tuple(weight.shape)))
        return quantize(weight, *args, **kwargs)

    monkeypatch.setattr(blockwise, "quantize_with_feedback", counting)
    patch_model(model, calibration=torch.arange(2, 66).view(4, 16), **QUIET)
    # The widest comes first. q, k, v read one input and are quantized together (64 + 32 + 32 rows), so are gate and up.
    shapes = [(64, 96), (128, 64), (64, 64), (192, 64)] * 3
    packed = [7 * block + done for block in range(3) for done in (0, 1, 4, 5)]
    assert seen == [(21 - done, done, shape) for done, shape in zip(packed, shapes, strict=True)]
    assert not any(ref() is not None for ref in originals)


def test_moments_are_those_of_the_inputs_behind_int4_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama()
    ids = torch.randint(2, 199, (10, 9), generator=torch.Generator().manual_seed(6))
    moments = []
    quantize = blockwise.quantize_with_feedback

    def recording(weight: torch.Tensor, moment: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        moments.append(moment.clone())
        return quantize(weight, moment, *args, **kwargs)

    monkeypatch.setattr(blockwise, "quantize_with_feedback", recording)
    patch_model(model, calibration=ids, **QUIET)
    inputs: list[torch.Tensor] = []
    handle = model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    logits(model, ids)
    handle.remove()
    rows = inputs[0].reshape(-1, 64).double()
    # The int4 product rounds activations to bf16, in batches of another size by other kernels: a few parts in 2^8.
    torch.testing.assert_close(moments[5].double(), rows.T @ rows / rows.shape[0], rtol=0.02, atol=0.02)


def test_modes_and_interruptions_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama().train()
    before = fingerprint(model)
    quantize, calls = blockwise.quantize_with_feedback, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return quantize(*args, **kwargs)

    monkeypatch.setattr(blockwise, "quantize_with_feedback", interrupted)
    with pytest.raises(KeyboardInterrupt):
        patch_model(model, calibration=torch.arange(2, 66).view(4, 16), keep_original=True, **QUIET)
    assert fingerprint(model) == before
    assert not any(module._forward_pre_hooks for module in model.modules())
    patch_model(model, calibration=torch.arange(2, 66).view(4, 16), **QUIET)
    assert all(module.training for module in model.modules())


def test_inputs_that_are_not_finite_are_named() -> None:
    model = make_llama()
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        patch_model(model, calibration=torch.arange(2, 66).view(4, 16), **QUIET)


def test_tokens_are_drawn_with_their_likelihood() -> None:
    from hf_fastpath.calibration import _sample

    likelihood = torch.tensor([0.0, 0.5, 0.0, 0.25, 0.25, 0.0]).expand(40_000, -1)
    drawn = _sample(likelihood, torch.Generator().manual_seed(0))
    assert drawn.shape == (40_000, 1)
    shares = drawn.flatten().bincount(minlength=6) / 40_000
    assert not shares[[0, 2, 5]].any()
    # Four standard errors of a share of a half.
    torch.testing.assert_close(shares, likelihood[0], rtol=0, atol=4 * 0.5 / 200)
