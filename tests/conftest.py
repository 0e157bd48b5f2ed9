"""Small models and helpers that the tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.set_num_threads(2)


def make_llama(dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A two-layer Llama with grouped-query attention and weights wide enough that its logits differ by position."""
    settings: dict[str, Any] = {
        "vocab_size": 199,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    } | overrides
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**settings)).to(dtype).eval()


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
