"""The accuracy benchmark: what it counts as a weight's bits, and the configurations that it goes through."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
from tiny_models import make_lfm2_moe, make_llama

from hf_fastpath import FastpathConfig, patch_model
from hf_fastpath.eval.bench_accuracy import bits_per_weight, variants
from hf_fastpath.eval.peers import round_with_hqq


@pytest.mark.parametrize(("zeros", "bits"), [(False, 4 + 16 / 64), (True, 4 + 16 / 64 + 8 / 64)])
def test_bits_are_those_of_the_format_before_and_after_the_first_call(zeros: bool, bits: float) -> None:
    shapes = {"hidden_size": 64, "intermediate_size": 128}  # whole tiles, so that nothing is padding
    model = patch_model(
        make_llama(torch.bfloat16, **shapes), group_size=64, zero_points=zeros, scale_search="absmax", progress=False
    )
    assert bits_per_weight(model) == pytest.approx(bits)
    model(torch.tensor([[1, 2, 3]]))  # on the CPU this changes the layout that a layer holds
    assert bits_per_weight(model) == pytest.approx(bits)


def test_the_bits_of_experts_count() -> None:
    shapes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "num_experts": 9}
    model = patch_model(
        make_lfm2_moe(torch.bfloat16, **shapes), group_size=64, scale_search="absmax", zero_points=False, progress=False
    )
    assert bits_per_weight(model) == pytest.approx(4 + 16 / 64)
    model.model.layers[1].feed_forward.experts.down.zeros = torch.zeros(1)  # 32 bits more
    assert bits_per_weight(model) > 4 + 16 / 64


def test_every_search_and_size_once_and_the_calibrated_one_last() -> None:
    stock, *others, last = variants(FastpathConfig(), Path("text.txt"))
    assert stock is None
    assert len({str(variant) for variant in others}) == len(others) == 4 * 2 * 2
    assert all(variant is not None and variant.calibration is None for variant in others)
    assert last is not None
    assert last.config == FastpathConfig(scale_search="output")  # type: ignore[arg-type]
    assert last.calibration == Path("text.txt")


def test_hqq_rounds_the_layers_that_we_would_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package itself is not installed here: what stands in for it rounds to zero."""
    groups = []

    class Quantizer:
        @staticmethod
        def quantize(weight: torch.Tensor, group_size: int, **settings: object) -> tuple[torch.Tensor, None]:
            groups.append((tuple(weight.shape), group_size))
            return weight, None

        @staticmethod
        def dequantize(codes: torch.Tensor, meta: None) -> torch.Tensor:
            return torch.zeros_like(codes)

    package = types.ModuleType("hqq.core.quantize")
    package.Quantizer = Quantizer  # type: ignore[attr-defined]
    for name in ("hqq", "hqq.core", "hqq.core.quantize"):
        monkeypatch.setitem(sys.modules, name, package)
    model = make_llama(torch.bfloat16, hidden_size=64, intermediate_size=128)
    head = model.lm_head.weight.clone()
    bits = round_with_hqq(model, 128)
    assert {group for shape, group in groups if shape[1] == 64} == {64}
    assert {group for shape, group in groups if shape[1] == 128} == {128}
    assert 4 + 32 / 128 < bits < 4 + 32 / 64
    assert not model.model.layers[0].mlp.up_proj.weight.any()
    assert torch.equal(model.lm_head.weight, head)


def test_hqq_is_asked_for_in_words() -> None:
    with pytest.raises(RuntimeError, match="pip install hqq"):
        round_with_hqq(make_llama(), 128)
