"""Fixtures that the tests share."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_cases import with_graphs
from tiny_models import make_llama
from transformers import LlamaForCausalLM

from hf_fastpath import patch_model

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)  # several processes share the cores


def pytest_collection_finish() -> None:
    """Modules and collected tests stay to the end; a garbage collection that walks them all takes half a second."""
    gc.freeze()


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return make_llama()


@pytest.fixture
def prompt() -> torch.Tensor:
    return torch.randint(2, 199, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def padded() -> dict[str, torch.Tensor]:
    """A batch whose rows are left-padded by 0, 3 and 5 tokens."""
    ids = torch.randint(2, 199, (3, 8), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 3, 5)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def count_calls(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], list[tuple[Any, ...]]]:
    """Wraps a function of a module or class so that its calls are recorded: ``calls = count_calls(owner, "name")``."""

    def wrap(owner: Any, name: str) -> list[tuple[Any, ...]]:
        calls: list[tuple[Any, ...]] = []
        original = getattr(owner, name)

        def recorded(*args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, recorded)
        return calls

    return wrap


@pytest.fixture
def patched() -> Any:
    """A patched model with graphs, which only models on a GPU use by themselves. Of the caches int4 is the one where
    most hangs on how many tokens there were."""
    return with_graphs(patch_model(make_llama(), weights=None, kv_cache="int4"))
