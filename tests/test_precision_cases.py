"""The comparison that tests/gpu/test_gpu_full_shape.py makes, on a small mixture of experts: it passes what is as exact
as stock, and faults fail it."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from precision_cases import LOSSLESS, Logits, check_as_exact_as_stock, greedy_text, logits, oracle, relative_errors
from tiny_models import make_lfm2_moe

from hf_fastpath import patch_model
from hf_fastpath.caches import StaticKVCache

SIZES = {
    **{"num_hidden_layers": 6, "layer_types": ["conv", "conv", "full_attention"] * 2, "num_dense_layers": 2},
    **{"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 32},
    **{"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 64, "vocab_size": 499},
    "initializer_range": 0.05,
}
PROMPT, STEPS, ROWS = 48, 16, 4


def model_of_the_test() -> Any:
    return make_lfm2_moe(torch.bfloat16, **SIZES)


@functools.cache
def measured() -> tuple[torch.Tensor, Logits, Logits]:
    """A text, stock's logits of it, and the exact ones."""
    model = model_of_the_test()
    ids = greedy_text(model, ROWS, PROMPT, STEPS)
    return ids, logits(model, ids, PROMPT), oracle(model, ids, PROMPT)


def check(model: Any) -> None:
    ids, stock, exact = measured()
    check_as_exact_as_stock(logits(model, ids, PROMPT), stock, exact)


def patched(**options: Any) -> Any:
    return patch_model(model_of_the_test(), progress=False, **options)


def test_stock_has_an_error_that_rounding_explains() -> None:
    _, stock, exact = measured()
    for error in relative_errors(stock, exact).values():
        assert 2**-9 < error < 0.1


@pytest.mark.parametrize("options", LOSSLESS.values(), ids=LOSSLESS)
def test_the_lossless_mode_is_as_exact_as_stock(options: dict[str, Any]) -> None:
    check(patched(**options))


def test_int4_weights_are_not() -> None:
    with pytest.raises(AssertionError, match="prompt"):
        check(patched(scale_search="absmax"))


def test_another_expert_is_not() -> None:
    model = patched(**LOSSLESS["as they are"])
    experts = model.model.layers[4].feed_forward.experts
    with torch.no_grad():
        experts.down_proj.data = experts.down_proj.data.roll(1, 0)
    with pytest.raises(AssertionError, match="prompt"):
        check(model)


def test_a_cache_that_loses_a_token_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt is exact, and what comes after the first step is not."""
    layer = StaticKVCache.layer_class
    read = layer.read

    def forget(self: Any, key: torch.Tensor, value: torch.Tensor) -> Any:
        keys, values = read(self, key, value)
        if key.shape[2] == 1:
            keys, values = keys.clone(), values.clone()
            keys[:, :, PROMPT // 2 : PROMPT], values[:, :, PROMPT // 2 : PROMPT] = 0, 0
        return keys, values

    monkeypatch.setattr(layer, "read", forget)
    with pytest.raises(AssertionError, match="steps"):
        check(patched(**LOSSLESS["as they are"]))
