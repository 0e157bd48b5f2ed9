"""What a patched model consists of, and that every change of it is seen."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import make_llama
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from hf_fastpath.model_watch import ModelWatch


def own_forward(model: Any) -> None:
    norm = model.model.norm
    norm.forward = norm.forward


CHANGES: dict[str, Callable[[Any], None]] = {
    "replaced": lambda model: model.set_submodule("lm_head", nn.Linear(64, 199, bias=False)),
    "wrapped": lambda model: model.set_submodule("model.layers.1.mlp", nn.Sequential(model.model.layers[1].mlp)),
    "added": lambda model: model.model.layers[0].add_module("adapter", nn.Identity()),
    "removed": lambda model: model.model.layers[0].mlp.__delattr__("act_fn"),
    "layer gone": lambda model: model.model.layers.__delitem__(1),
    "layers in another order": lambda model: model.model.layers.insert(0, model.model.layers.pop(1)),
    "another class": lambda model: setattr(model.model.norm, "__class__", nn.Identity),
}
HOOKS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "before": (lambda model: model.model.layers[0].mlp.register_forward_pre_hook(print), "model.layers.0.mlp"),
    "behind": (lambda model: model.lm_head.register_forward_hook(print), "lm_head"),
    "before the model": (lambda model: model.register_forward_pre_hook(print), "the model"),
    "behind the model": (lambda model: model.register_forward_hook(print), "the model"),
    "a forward of its own": (own_forward, "model.norm"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_modules_are_seen(change: str) -> None:
    model = make_llama()
    watch = ModelWatch(model)
    assert watch.why_not(model) == ""
    CHANGES[change](model)
    assert watch.why_not(model) == "modules were added, wrapped or replaced after patch_model()"


@pytest.mark.parametrize("place", HOOKS)
def test_hooks_are_seen_and_named(place: str) -> None:
    model = make_llama()
    model.register_forward_pre_hook(lambda *_: None)  # as patch_model() leaves one
    watch = ModelWatch(model)
    assert watch.why_not(model) == ""
    hook, name = HOOKS[place]
    handle = hook(model)
    assert watch.why_not(model) == f"{name} has a forward hook"
    if handle is not None:
        handle.remove()
        assert watch.why_not(model) == ""


def test_a_hook_of_all_modules_and_a_hook_that_went_are_seen() -> None:
    model = make_llama()
    own = model.register_forward_pre_hook(lambda *_: None)
    watch = ModelWatch(model)
    handle = register_module_forward_hook(lambda *_: None)
    assert watch.why_not(model) == "the model has a forward hook"
    handle.remove()
    assert watch.why_not(model) == ""
    own.remove()
    assert watch.why_not(model) == "the model has a forward hook"


def test_another_model_is_not_this_one() -> None:
    assert ModelWatch(make_llama()).why_not(make_llama()).startswith("modules")


@pytest.mark.parametrize("change", ["moved", "replaced", "a new buffer", "gone"])
def test_tensors_elsewhere_are_seen(change: str) -> None:
    model = make_llama()
    watch, norm = ModelWatch(model), model.model.norm
    assert not watch.tensors_moved
    if change == "moved":
        norm.weight.data = norm.weight.data.clone()
    elif change == "replaced":
        norm.weight = nn.Parameter(norm.weight.detach().clone())
    elif change == "gone":
        norm.weight = None
    else:
        norm.register_buffer("mean", torch.zeros(4))
    assert watch.why_not(model) == ""
    assert watch.tensors_moved
    watch.note_addresses()
    assert not watch.tensors_moved


def test_it_keeps_nothing_alive() -> None:
    model = make_llama()
    watch, head = ModelWatch(model), weakref.ref(model.lm_head)
    model.lm_head = nn.Identity()
    gc.collect()
    assert head() is None
    assert watch.why_not(model).startswith("modules")
