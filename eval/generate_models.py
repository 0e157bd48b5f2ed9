"""The models that ``hf-fastpath bench generate`` runs: random weights of real shapes, or a checkpoint; and variants."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_fastpath.eval.loading import load, pick_dtype

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
    "lfm2.5-8b-a1b": {
        "model_type": "lfm2_moe",
        "vocab_size": 128000,
        "num_hidden_layers": 24,
        "layer_types": ["full_attention" if i in (2, 6, 10, 14, 18, 21) else "conv" for i in range(24)],
    },
    "lfm2-1.2b": {
        "model_type": "lfm2",
        "vocab_size": 65536,
        "hidden_size": 2048,
        "intermediate_size": 12288,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "layer_types": ["full_attention" if i in (2, 5, 8, 10, 12, 14) else "conv" for i in range(16)],
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
        "max_position_embeddings": 131072,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
    },
    "gpt2": {"model_type": "gpt2"},
}

STOCK, COMPILED, LOSSLESS, DEFAULT = "stock", "compiled", "lossless", "w4a16+int8"
VARIANTS: dict[str, dict[str, Any] | None] = {  # what patch_model gets; None: nothing is patched
    STOCK: None,
    COMPILED: None,
    LOSSLESS: {"weights": "w16a16", "kv_cache": "static"},
    "w4a16+static": {"kv_cache": "static"},
    DEFAULT: {},
    "w4a16+fp8": {"kv_cache": "fp8"},
    "w4a16+int4": {"kv_cache": "int4"},
    "w4a16+h2o": {"kv_cache": "h2o"},
    "w4a16+int8+int8-head": {"lm_head": "int8"},
    "w4a16+int4+int8-head": {"kv_cache": "int4", "lm_head": "int8"},
}
DEFAULTS = (STOCK, COMPILED, LOSSLESS, DEFAULT)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the model comes from: a shape of :data:`SHAPES` with random weights, or a checkpoint.

    Args:
        shape: None: ``model``, a folder or a hub id, of which None is the demo's model.
        dtype: ``"bf16"``, ``"fp16"``, ``"fp32"``, and of a checkpoint ``"auto"``.

    Raises:
        ValueError: both are given, or there is no such shape.
    """

    shape: str | None = None
    model: str | None = None
    device: str = "cpu"
    dtype: str = "bf16"

    def __post_init__(self) -> None:
        if self.shape is not None and self.model is not None:
            raise ValueError("--shape is for random weights and --model for a checkpoint: give one of them")
        if self.shape is not None and self.shape not in SHAPES:
            raise ValueError(f"shape {self.shape!r}: allowed are {', '.join(SHAPES)}")
        if self.shape is not None and self.dtype == "auto":
            raise ValueError("dtype auto is what a checkpoint names: random weights need bf16, fp16 or fp32")

    def build(self) -> tuple[Any, str]:
        """The model in evaluation mode, never patched, and its name."""
        if self.shape is None:
            loaded = load(self.model, self.device, self.dtype)
            return loaded.model, loaded.name
        return random_model(self.shape, self.device, self.dtype), self.shape


def random_model(shape: str, device: str, dtype: str = "bf16") -> Any:
    """A model of a real shape; its weights are as the config initializes them."""
    torch.manual_seed(0)
    settings = dict(SHAPES[shape], bos_token_id=None, eos_token_id=None, pad_token_id=None)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=pick_dtype(dtype)).eval()


def parse_variants(text: str) -> tuple[str, ...]:
    """``"stock,w4a16+int8"``: names of :data:`VARIANTS`.

    Raises:
        ValueError: another name, or one twice.
    """
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in VARIANTS:
            raise ValueError(f"variant {name!r}: allowed are {', '.join(VARIANTS)}")
    if len(set(names)) != len(names):
        raise ValueError(f"variants {text!r}: one is there twice")
    return names
