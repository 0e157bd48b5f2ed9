"""The packed language-model head, int4 and int8, tied and untied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import fingerprint, logits, make_llama
from torch import nn
from transformers import AutoModelForCausalLM

from hf_fastpath import FastpathConfig, Unsupported, fastpath_report, patch_model, unpatch_model
from hf_fastpath.modules import W4A16Linear, W8A16Linear

KINDS = {"int4": W4A16Linear, "int8": W8A16Linear}
IDS = torch.randint(0, 199, (2, 9), generator=torch.Generator().manual_seed(1))


def patch(model: Any, **options: Any) -> Any:
    return patch_model(
        model, **({"lm_head": "int4", "kv_cache": None, "scale_search": "activation", "progress": False} | options)
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("lm_head", ["int4", "int8"])
def test_the_head_is_packed_and_the_embeddings_stay(lm_head: str, tied: bool) -> None:
    model = make_llama(torch.bfloat16, tie_word_embeddings=tied)
    before, embeddings = logits(model, IDS).float(), model.model.embed_tokens.weight.clone()
    patch(model, weights=None, lm_head=lm_head)
    assert isinstance(model.lm_head, KINDS[lm_head])
    assert model.get_output_embeddings() is model.lm_head
    assert torch.equal(model.model.embed_tokens.weight, embeddings)
    assert not model.config.tie_word_embeddings
    row = next(row for row in fastpath_report(model).rows if row.name == "lm_head")
    assert row.action.startswith(lm_head)
    assert (row.bytes_before == 0) == tied
    after = logits(model, IDS).float()
    # Half a step is 1/30 (1/254) of a group's range, some 6 standard deviations wide; bf16 logits add 2^-9.
    assert 0 < float((after - before).norm() / before.norm()) < {"int4": 0.15, "int8": 0.02}[lm_head]


def test_the_head_weighs_its_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_fastpath import steps

    seen: dict[int, torch.Tensor | None] = {}
    quantize = steps.quantize_int4

    def noting(weight: torch.Tensor, *args: Any, importance: torch.Tensor | None, **kwargs: Any) -> Any:
        seen[weight.shape[0]] = importance
        return quantize(weight, *args, importance=importance, **kwargs)

    monkeypatch.setattr(steps, "quantize_int4", noting)
    model = make_llama()
    inputs: list[torch.Tensor] = []
    handle = model.lm_head.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    from hf_fastpath.activations import random_walk

    logits(model, random_walk(model, "model.layers").tokens)
    handle.remove()
    patch(model)
    expected = inputs[0][:, 1:].float().square().mean((0, 1))
    assert seen[199] is not None
    torch.testing.assert_close(seen[199], expected)


@pytest.mark.parametrize("tied", [False, True])
def test_tying_later_does_not_undo_it(tied: bool) -> None:
    model = patch(make_llama(tie_word_embeddings=tied))
    before = logits(model, IDS)
    model.tie_weights()
    model.tie_weights(recompute_mapping=False)
    assert isinstance(model.lm_head, W4A16Linear)
    assert not hasattr(model.lm_head, "weight")
    assert torch.equal(logits(model, IDS), before)


@pytest.mark.parametrize("keep", [False, True])
def test_a_tied_head_is_tied_again(keep: bool) -> None:
    model = make_llama(tie_word_embeddings=True)
    stock, trace = logits(model, IDS), fingerprint(model)
    patch(model, weights=None, keep_original=keep)
    unpatch_model(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings
    model.tie_weights()
    assert fingerprint(model) == trace
    assert torch.equal(logits(model, IDS), stock)


def test_an_untied_head_needs_its_original() -> None:
    model = patch(make_llama(), weights=None)
    with pytest.raises(Unsupported, match="lm_head"):
        unpatch_model(model)
    unpatch_model(model, dequantize=True)
    assert type(model.lm_head) is nn.Linear


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("lm_head", ["int4", "int8"])
def test_saving_and_loading(tmp_path: Path, lm_head: str, tied: bool) -> None:
    make_llama(torch.bfloat16, tie_word_embeddings=tied).save_pretrained(tmp_path / "float")
    config = FastpathConfig(lm_head=lm_head, scale_search="activation", progress=False)  # type: ignore[arg-type]
    patched = patch_model(AutoModelForCausalLM.from_pretrained(tmp_path / "float"), config)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    patched.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert [(row.name, row.bytes_before) for row in fastpath_report(loaded).rows] == [
        (row.name, row.bytes_before) for row in fastpath_report(patched).rows
    ]
    for model in (loaded, again):
        model.tie_weights()
        assert not hasattr(model.lm_head, "weight")
        assert isinstance(model.lm_head, KINDS[lm_head])
        assert torch.equal(logits(model, IDS), logits(patched, IDS))
        assert torch.equal(model.model.embed_tokens.weight, patched.model.embed_tokens.weight)
    unpatch_model(loaded, dequantize=True)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_the_head_is_chosen_by_its_output_last() -> None:
    """On the error of its output, which the search by activations leaves larger."""
    model, other = make_llama(hidden_size=128), make_llama(hidden_size=128)
    tokens = torch.randint(0, 199, (16, 32), generator=torch.Generator().manual_seed(2))
    inputs: list[torch.Tensor] = []
    handle = model.lm_head.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, 1)))
    expected = logits(model, tokens).flatten(0, 1)
    handle.remove()
    patch_model(model, weights=None, lm_head="int4", scale_search="output", progress=False, calibration=tokens)
    patch(other, weights=None)
    errors = [(m.lm_head(inputs[0]) - expected).square().mean() for m in (model, other)]
    assert errors[0] < 0.9 * errors[1]


def test_a_model_without_a_linear_head_is_refused() -> None:
    model = make_llama()
    model.lm_head = nn.Identity()
    with pytest.raises(Unsupported, match="no linear language-model head"):
        patch(model)
