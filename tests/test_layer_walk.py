"""The walk over decoder layers: what it computes is what the model computes, whatever each layer is called with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import fingerprint, make_llama
from transformers import Qwen2Config, Qwen2ForCausalLM

from hf_fastpath.layer_walk import LayerWalk, watching_inputs

IDS = torch.randint(2, 199, (5, 12), generator=torch.Generator().manual_seed(3))


def make_mixed() -> Qwen2ForCausalLM:
    """Full attention in one layer, a window of 3 tokens in the next two: masks that differ by layer."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=199,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        use_sliding_window=True,
        sliding_window=3,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
    )
    return Qwen2ForCausalLM(config).eval()


@pytest.mark.parametrize("make", [make_llama, make_mixed])
def test_walking_all_layers_gives_the_bodys_output(make: Any) -> None:
    model = make()
    with torch.no_grad():
        expected = [model.base_model(ids, use_cache=False)[0] for ids in IDS.split(2)]
    walk = LayerWalk(model, "model.layers", IDS, batch=2)
    for index in range(len(walk.layers)):
        list(walk.outputs(index))  # looking at a layer does not move the walk on
        walk.run_layer(index)
    for got, wanted in zip(walk.head_inputs(), expected, strict=True):
        assert torch.equal(got, wanted)


def test_layers_of_one_model_are_called_with_masks_of_their_own() -> None:
    """So that the test above would fail if each were called with the first one's."""
    walk = LayerWalk(make_mixed(), "model.layers", IDS, batch=5)
    list(walk.outputs(0))
    (calls,) = walk.calls
    masks = [kwargs["attention_mask"] for _, kwargs in calls]
    assert masks[1] is not None
    assert masks[0] is None or not torch.equal(masks[0], masks[1])


def test_a_layer_runs_with_its_weights_as_they_are_then() -> None:
    model = make_llama()
    walk = LayerWalk(model, "model.layers", IDS, batch=5)
    walk.run_layer(0)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(2)
        walk.run_layer(1)
        (got,) = walk.head_inputs()
        assert torch.equal(got, model.base_model(IDS, use_cache=False)[0])


def test_inputs_are_seen_and_no_trace_is_left() -> None:
    model = make_llama().train()
    state = fingerprint(model)
    seen: list[tuple[str, tuple[int, ...]]] = []
    walk = LayerWalk(model, "model.layers", IDS, batch=2)
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
    with watching_inputs(model, names, lambda name, x: seen.append((name, tuple(x.shape)))):
        walk.run_layer(0)
    assert seen == [(name, (n, 12, width)) for n in (2, 2, 1) for name, width in zip(names, (64, 96), strict=True)]
    walk.run_layer(1)
    list(walk.head_inputs())
    assert fingerprint(model) == state
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in model.modules())
    assert all(module.training for module in model.modules())


def test_a_failing_layer_leaves_no_trace() -> None:
    model = make_llama()
    walk = LayerWalk(model, "model.layers", IDS + 1000, batch=2)
    with pytest.raises(IndexError):
        walk.run_layer(0)
    assert not any("forward" in vars(module) for module in model.modules())
