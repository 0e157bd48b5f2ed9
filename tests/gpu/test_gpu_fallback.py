"""The reference implementations on a GPU, for what the kernels do not take."""

from __future__ import annotations

import pytest
import torch
from tiny_models import logits, make_llama

from hf_fastpath import FastpathConfig, Unsupported, fastpath_report, patch_model

pytestmark = pytest.mark.gpu


def test_a_float32_model_runs_on_the_references() -> None:
    config = FastpathConfig(scale_search="absmax", progress=False)
    with pytest.raises(Unsupported, match="fallback='reference'"):
        patch_model(make_llama().cuda(), config)
    model = patch_model(make_llama().cuda(), config, fallback="reference")
    assert "slow reference implementations" in str(fastpath_report(model))
    ids = torch.randint(0, 199, (2, 40), device="cuda")
    out = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert out.shape == (2, 44)
    # The same int4 weights as plain float32 layers.
    from hf_fastpath import unpatch_model

    got = logits(model, ids)
    expected = logits(unpatch_model(model, dequantize=True), ids)
    # Both are float32 products of the same numbers, in another order.
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
