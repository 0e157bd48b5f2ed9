"""What the caches of every format share: layers of one kind, beside short convolutions, and the operations of
generate() on batch and length."""

from __future__ import annotations

import copy
import math
from typing import Any, cast

import torch
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig

from hf_fastpath.caches.conv_state import ConvStateLayer, LeftPadding
from hf_fastpath.caches.layer import FastLayer
from hf_fastpath.errors import Unsupported


class FastCache(Cache):
    """A transformers Cache whose attention layers are all of one :class:`FastLayer` format.

    Layers that are short convolutions (LFM2) have a :class:`ConvStateLayer` each.

    Layers with a sliding window keep every token too: transformers' masks hide those that left the window.

    Args:
        config: the model's config. Every layer must be full or sliding attention, or a short convolution.
        max_cache_len: tokens to make room for at once. The cache grows beyond it when it must.

    Raises:
        Unsupported: the model has other layers, or no attention, or is an encoder-decoder.
    """

    layer_class: type[FastLayer]
    layer_kinds = frozenset({"conv", "full_attention", "sliding_attention"})  # those that the cache serves

    def __init__(self, config: PreTrainedConfig, *, max_cache_len: int = 0, **layer_options: Any) -> None:
        config = config.get_text_config(decoder=True)
        self._check(config)
        if max_cache_len < 0:
            raise ValueError(f"max_cache_len={max_cache_len}: must be 0 or more")
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        self.padding = LeftPadding() if "conv" in kinds else None
        layers: list[Any] = [
            ConvStateLayer(self.padding)
            if kind == "conv" and self.padding
            else self.layer_class(max_cache_len, **layer_options)
            for kind in kinds[: config.num_hidden_layers]
        ]
        super().__init__(layers=layers)
        self.kv_heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.dtype: torch.dtype = getattr(config, "dtype", None) or torch.get_default_dtype()

    @classmethod
    def _check(cls, config: PreTrainedConfig) -> None:
        if getattr(config, "is_encoder_decoder", False):
            raise Unsupported(f"{cls.__name__}: encoder-decoder models are not supported")
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if getattr(config, "sliding_window", None) is not None:
            kinds.add("sliding_attention")
        if not kinds <= cls.layer_kinds or kinds == {"conv"}:
            allowed, found = (", ".join(sorted(names)) for names in (cls.layer_kinds - {"conv"}, kinds))
            raise Unsupported(
                f"{cls.__name__} needs layers of {allowed}, beside which there may be short convolutions; this model "
                f"has {found}"
            )

    @property
    def nbytes(self) -> int:
        """Bytes allocated, all layers."""
        return sum(layer.nbytes for layer in cast(list[Any], self.layers))

    @property
    def untouched(self) -> bool:
        """Whether it never held anything."""
        return not any(layer.has_storage for layer in cast(list[Any], self.layers))

    @property
    def can_forget(self) -> bool:
        """Whether ``crop()`` takes tokens back without ``activate_past_recording()`` before they came, which short
        convolutions need."""
        return self.is_croppable and self.padding is None

    @property
    def attends_in_kernel(self) -> bool:
        """Whether the attention of a new token is a kernel that finds the length in GPU memory."""
        return all(layer.attends_in_kernel for layer in self._fast_layers)

    @property
    def initial_tokens(self) -> int:
        """Tokens of a row that room is made for at once."""
        return self._fast_layers[0].initial_tokens

    def empty_like(self, max_cache_len: int) -> FastCache:
        """A cache like this one, which never held anything, with room for so many tokens."""
        cache = copy.deepcopy(self)
        for layer in cache._fast_layers:
            layer.initial_tokens = max_cache_len
        return cache

    @property
    def kind(self) -> Any:
        """Equal for caches of one model that store alike."""
        layer = self._fast_layers[0]
        options = {name: getattr(layer, name) for name in layer.option_names}
        return type(self), tuple(options.items())

    @property
    def _fast_layers(self) -> list[FastLayer]:
        return [layer for layer in self.layers if isinstance(layer, FastLayer)]

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one more token of one sequence takes in all layers, scales included, rounded up."""
        layers = self._fast_layers
        if not layers[0].is_initialized:
            return math.ceil(len(layers) * self.kv_heads * layers[0].bytes_per_head(self.head_dim, self.dtype))
        growing = [
            tensor.nbytes / (tensor.shape[0] * tensor.shape[2] * tokens)
            for layer in layers
            for tensor, tokens in zip(layer.storage, layer.tokens_per_entry, strict=True)
            if tokens
        ]
        return math.ceil(sum(growing))
