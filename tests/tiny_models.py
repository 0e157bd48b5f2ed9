"""Small random models that the tests share."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


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
    model = LlamaForCausalLM(LlamaConfig(**settings))
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):  # transformers initializes them to 0, where losing one would not show
            torch.nn.init.normal_(parameter, std=settings["initializer_range"])
    return model.to(dtype).eval()


def long_batch(padding: tuple[int, ...], tokens: int = 70) -> dict[str, torch.Tensor]:
    """A batch of rows with that much padding on the left, long enough that every cache format has quantized tokens."""
    ids = torch.randint(2, 199, (len(padding), tokens), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(tokens) >= torch.tensor(padding)[:, None]
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def fingerprint(model: Any) -> dict[str, Any]:
    """Everything about a model that a failed or undone patch must leave alone."""
    return {
        "modules": [(name, type(module), id(module)) for name, module in model.named_modules()],
        "tensors": {name: (id(value), value._version) for name, value in model.named_parameters()},
        "attention": model.config._attn_implementation,
        "attributes": sorted(model.__dict__),
        "hooks": len(model._forward_pre_hooks) + len(model._forward_pre_hooks_with_kwargs),
        "generation": model.generation_config.to_dict(),
        "training": model.training,
    }
