"""The accuracy benchmark: what it counts as a weight's bits, and the configurations that it goes through."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import make_lfm2_moe, make_llama

from hf_fastpath import FastpathConfig, patch_model
from hf_fastpath.eval.bench_accuracy import bits_per_weight, variants


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
