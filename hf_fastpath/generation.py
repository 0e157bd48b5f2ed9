"""How generate() and forward() of a model come to use our caches."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import GenerationMixin
from transformers.generation import configuration_utils

from hf_fastpath.caches import FastCache, Fp8KVCache, H2OKVCache, Int4KIVICache, Int8KVCache, StaticKVCache
from hf_fastpath.caches.attention import register_attention
from hf_fastpath.config import KVFormat

CACHES: dict[KVFormat, type[FastCache]] = {
    KVFormat.STATIC: StaticKVCache,
    KVFormat.INT8: Int8KVCache,
    KVFormat.FP8: Fp8KVCache,
    KVFormat.INT4: Int4KIVICache,
    KVFormat.H2O: H2OKVCache,
}
CACHE_NAMES: dict[str, KVFormat] = {f"fastpath_{fmt.value}": fmt for fmt in CACHES}

# Room made at once for a generate() call that allows many new tokens; most calls stop long before their limit.
_MAX_PREALLOCATED_TOKENS = 8192

_POSITION_OF_PAST = 3  # forward(input_ids, attention_mask, position_ids, past_key_values, ...)


def register() -> None:
    """Makes ``cache_implementation="fastpath_int8"`` (and every other format's name) and
    ``attn_implementation="fastpath"`` known to transformers, for every model. Idempotent."""
    register_attention()
    settings: Any = configuration_utils
    known = settings.ALL_CACHE_IMPLEMENTATIONS
    settings.ALL_CACHE_IMPLEMENTATIONS = (*known, *(name for name in CACHE_NAMES if name not in known))
    mixin: Any = GenerationMixin
    stock = mixin._prepare_cache_for_generation
    if hasattr(stock, "_fastpath_wraps"):
        return

    # An accepted name that no one acts on would silently give a DynamicCache, so the names work on every model.
    @functools.wraps(stock)
    def prepare_named_cache(
        self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        kv_format = CACHE_NAMES.get(generation_config.cache_implementation)
        if kv_format is None or not _needs_cache(generation_config, model_kwargs):
            return stock(self, generation_config, model_kwargs, *args, **kwargs)
        model_kwargs["past_key_values"] = _generation_cache(self, kv_format, generation_config, args, kwargs)
        return None

    prepare_named_cache._fastpath_wraps = stock  # type: ignore[attr-defined]
    mixin._prepare_cache_for_generation = prepare_named_cache


def _needs_cache(generation_config: Any, model_kwargs: dict[str, Any]) -> bool:
    """Whether generate() is to make a cache: the user passed none, and did not ask for none."""
    return model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False


def _max_cache_length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The last parameter of ``_prepare_cache_for_generation``, in transformers 5.17 and 5.23 alike."""
    return int(kwargs.get("max_cache_length", args[-1] if args else 0))


def _new_cache(model: Any, kv_format: KVFormat, tokens: int) -> FastCache:
    state = getattr(model, "_fastpath", None)
    options: dict[str, Any] = {"reference": True} if state and state.reference and kv_format.compressed else {}
    if state and state.config.kv_cache is kv_format:
        options |= state.config.cache_options
    return CACHES[kv_format](model.config, max_cache_len=min(tokens, _MAX_PREALLOCATED_TOKENS), **options)


def _generation_cache(
    model: Any, kv_format: KVFormat, generation_config: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> FastCache:
    cache = _new_cache(model, kv_format, _max_cache_length(args, kwargs))
    if generation_config.is_assistant:  # its candidates will be taken back, the states of convolutions too
        cache.activate_past_recording()
    return cache


def prepare_default_cache(
    self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """Bound to a patched model as ``_prepare_cache_for_generation``: our cache where the user asked for none."""
    if generation_config.cache_implementation is None and _needs_cache(generation_config, model_kwargs):
        kv_format = self._fastpath.config.kv_cache
        model_kwargs["past_key_values"] = _generation_cache(self, kv_format, generation_config, args, kwargs)
        return None
    return type(self)._prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs)


def supply_default_cache(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook of a patched model: a plain ``model(input_ids)`` that would make a DynamicCache gets ours.

    Not while training, and not when gradients are wanted: a cache holds no graph. A cache with convolutions is told
    which tokens are padding.
    """
    cache = kwargs.get("past_key_values")
    if isinstance(cache, FastCache) and cache.padding is not None:
        tokens = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        cache.padding.see(mask, 0 if tokens is None else tokens.shape[1])
    use_cache = kwargs.get("use_cache")
    use_cache = model.config.use_cache if use_cache is None else use_cache
    passed = kwargs.get("past_key_values") is not None or len(args) > _POSITION_OF_PAST
    if not use_cache or passed or model.training or torch.is_grad_enabled():
        return None
    return args, {**kwargs, "past_key_values": _new_cache(model, model._fastpath.config.kv_cache, 0)}
