"""The graphs of a decode step without generate(): replayed, and profiled kernel by kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import long_batch, make_lfm2_moe, make_llama

from hf_fastpath import patch_model
from hf_fastpath.eval import profile_decode
from hf_fastpath.eval.graph_replay import replay_of

pytestmark = pytest.mark.gpu

SAMPLE = {"do_sample": True, "top_k": 20, "top_p": 0.9}


@pytest.mark.parametrize("how", [{"do_sample": False}, SAMPLE], ids=["greedy", "sample"])
@pytest.mark.parametrize("padding", [(0,), (0, 0)], ids=len)
@pytest.mark.parametrize("make", [make_llama, make_lfm2_moe])
def test_replayed_and_profiled(make: Any, padding: tuple[int, ...], how: dict[str, Any]) -> None:
    model = make(torch.bfloat16).cuda()
    for module in model.modules():
        if hasattr(module, "inv_freq"):  # which a cast of the whole model has rounded, so that it would stay as it is
            module.inv_freq = module.inv_freq.float()
    patch_model(model, scale_search="absmax", progress=False)
    inputs = {name: tensor.cuda() for name, tensor in long_batch(padding).items()}
    replay = replay_of(model, inputs, 60, **how)
    rows = profile_decode.profile(replay)
    found = profile_decode.roles(rows)
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * model.config.num_hidden_layers
    attention_layers = kinds.count("full_attention")
    assert {"product", "attention", "head", "choice"} <= set(found)
    assert "append" not in found  # of the int8 cache: it is in the attention
    assert sum(row["nodes"] for row in found["angles"]) == 1
    if not how["do_sample"]:
        assert sum(row["nodes"] for row in found["choice"]) == 2
        assert replay.choice is None
    assert not [row["kernel"] for row in rows if "emcpy" in row["kernel"]]  # the head writes where the choice reads
    assert sum(row["nodes"] for row in found["attention"]) == attention_layers
    assert rows[0]["wall_us"] > rows[0]["idle_us"] >= 0
    assert replay.rate(len(padding), at_most=8) > 0
    del replay
    prompt = profile_decode.profile_prompt(lambda: model.generate(**inputs, **how, max_new_tokens=1))
    assert {"product", "append", "head"} <= set(profile_decode.roles(prompt))
    assert prompt[0]["wall_us"] > prompt[0]["idle_us"] >= 0
    torch.manual_seed(1)
    got = model.generate(**inputs, **how, max_new_tokens=40)
    torch.manual_seed(1)
    assert torch.equal(model.generate(**inputs, **how, max_new_tokens=40, disable_compile=True), got)
