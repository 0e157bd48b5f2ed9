"""Small random models that the tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    Lfm2MoeConfig,
    Lfm2MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)


def make_llama(dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A two-layer Llama with grouped-query attention and weights wide enough that its logits differ by position."""
    return make_like_llama(LlamaForCausalLM, LlamaConfig, dtype, seed, **overrides)


def make_like_llama(
    kind: type[PreTrainedModel], config: type[Any], dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
) -> Any:
    """:func:`make_llama` of another class whose config has the same names."""
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
    return _randomized(kind, config(**settings), dtype, seed)


def make_gpt2(dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> GPT2LMHeadModel:
    """A two-layer GPT-2."""
    settings: dict[str, Any] = {
        "vocab_size": 199,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 512,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    } | overrides
    return _randomized(GPT2LMHeadModel, GPT2Config(**settings), dtype, seed)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One that knows 195 words (``a`` to ``z``, ``aa`` to ``zz``, ...), an unknown one and an end token."""
    words = ["[UNK]", "[EOS]", *(chr(ord("a") + i % 26) * (1 + i // 26) for i in range(195))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[EOS]")


LAYER_TYPES = ["conv", "full_attention", "conv"]


def make_lfm2(dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Lfm2ForCausalLM:
    """A three-layer LFM2 with convolutions before and after its attention."""
    settings = {"block_auto_adjust_ff_dim": False, "num_hidden_layers": 3, "layer_types": LAYER_TYPES}
    return make_like_llama(Lfm2ForCausalLM, Lfm2Config, dtype, seed, **(settings | overrides))


def make_lfm2_moe(dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Lfm2MoeForCausalLM:
    """A three-layer LFM2-MoE whose last two layers have four experts, and a bias that changes which are chosen."""
    settings: dict[str, Any] = {
        "num_hidden_layers": 3,
        "layer_types": LAYER_TYPES,
        "num_dense_layers": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "routed_scaling_factor": 1.5,
    } | overrides
    model = make_like_llama(Lfm2MoeForCausalLM, Lfm2MoeConfig, dtype, seed, **settings)
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            torch.nn.init.normal_(buffer, std=0.1)
    return model


def _randomized(kind: type[Any], config: Any, dtype: torch.dtype, seed: int) -> Any:
    """A model in which losing any weight shows: transformers initializes biases to 0 and norms to 1."""
    torch.manual_seed(seed)
    model = kind(config)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=config.initializer_range)
        elif "norm" in name or "ln_" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.to(dtype).eval()


def _like_llama(kind: type[PreTrainedModel], config: type[Any], **fixed: Any) -> Callable[..., Any]:
    return lambda *args, **overrides: make_like_llama(kind, config, *args, **(fixed | overrides))


# Every supported family, as README's table lists them: makers that take (dtype, seed, **settings of the config).
FAMILIES: dict[str, Callable[..., Any]] = {
    "llama": make_llama,
    "mistral": _like_llama(MistralForCausalLM, MistralConfig, sliding_window=None),
    "mistral, window": _like_llama(MistralForCausalLM, MistralConfig, sliding_window=6),
    "qwen2": _like_llama(Qwen2ForCausalLM, Qwen2Config),
    "qwen3": _like_llama(Qwen3ForCausalLM, Qwen3Config),
    "gemma": _like_llama(GemmaForCausalLM, GemmaConfig),
    "granite": _like_llama(GraniteForCausalLM, GraniteConfig, residual_multiplier=0.5, logits_scaling=2.0),
    "lfm2": make_lfm2,
    "lfm2_moe": make_lfm2_moe,
    "gpt2": make_gpt2,
}


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
