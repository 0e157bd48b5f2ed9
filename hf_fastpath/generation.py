"""How generate() and forward() of a model come to use our caches."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from transformers import GenerationMixin
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    GenerationMode,
    MaxLengthCriteria,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    configuration_utils,
)

from hf_fastpath.caches import FastCache, Fp8KVCache, H2OKVCache, Int4KIVICache, Int8KVCache, StaticKVCache
from hf_fastpath.caches.attention import ATTENTION_NAME, register_attention
from hf_fastpath.config import KVFormat
from hf_fastpath.decode_loop import decode
from hf_fastpath.heuristics import attn_decode_supports
from hf_fastpath.token_choice import Filters, Rule, settings_of

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

# Modes that transformers decodes in `_sample`, one token a row at each step.
_STEPPING_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
# What generate() passes to it that our loop knows.
_LOOP_INPUTS = frozenset(
    ("attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "inputs_embeds")
)
# Of these the loop chooses tokens on the GPU alone: what they are called there, in transformers' order, in which one
# op does them all.
_FILTERS: dict[type, str] = {
    TemperatureLogitsWarper: "temperature",
    TopKLogitsWarper: "top_k",
    TopPLogitsWarper: "top_p",
    MinPLogitsWarper: "min_p",
}
_SIMPLE_CRITERIA = (MaxLengthCriteria, EosTokenCriteria)

_POSITION_OF_PAST = 3  # forward(input_ids, attention_mask, position_ids, past_key_values, ...)


def register() -> None:
    """Makes ``cache_implementation="fastpath_int8"`` (and every other format's name) and
    ``attn_implementation="fastpath"`` known to transformers, for every model. Idempotent."""
    register_attention()
    _wrap_sample()
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


def static_in_kernel(model: Any, state: Any) -> bool:
    """Whether a patched model attends to a static cache in a kernel of ours: on a GPU, where its weights are packed, so
    that it does not give the bits of the stock model in any case. state: its PatchState."""
    if state.config.kv_cache is not KVFormat.STATIC or state.config.weights is None or state.reference:
        return False
    if state.attn_implementation not in (None, "sdpa") or model.device.type != "cuda":
        return False
    config = model.config.get_text_config(decoder=True)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return model.dtype in (torch.float16, torch.bfloat16) and attn_decode_supports(head_dim)


def _new_cache(model: Any, kv_format: KVFormat, tokens: int) -> FastCache:
    state = getattr(model, "_fastpath", None)
    options: dict[str, Any] = {"reference": True} if state and state.reference and kv_format.compressed else {}
    if state and state.config.kv_cache is kv_format:
        options |= state.config.cache_options
        options |= {"attends": True} if static_in_kernel(model, state) else {}
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
    """Bound to a patched model as ``_prepare_cache_for_generation``: our cache where the user asked for none, and a
    slot of CUDA graphs behind it, or behind one of ours that the user passed and that is empty."""
    name, state = generation_config.cache_implementation, self._fastpath
    kv_format = state.config.kv_cache if name is None else CACHE_NAMES.get(name)
    cache: Any = model_kwargs.get("past_key_values")
    if kv_format is not None and _needs_cache(generation_config, model_kwargs):
        cache = _generation_cache(self, kv_format, generation_config, args, kwargs)
        model_kwargs["past_key_values"] = cache
    else:
        type(self)._prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs)
    mode = kwargs.get("generation_mode", args[0] if args else None)
    steps = mode in _STEPPING_MODES and not generation_config.is_assistant and _can_be_lent_to(self, cache)
    if state.graphs is not None and state.graphs.vet(self, cache if steps else None):
        batch = kwargs.get("batch_size", args[1] if len(args) > 1 else 1) * generation_config.num_return_sequences
        positions = model_kwargs.get("position_ids")
        prompt = 0 if positions is None else positions.shape[-1]
        tokens = min(_max_cache_length(args, kwargs), prompt + _MAX_PREALLOCATED_TOKENS)
        state.graphs.lend(cache, batch, max(tokens, cache.initial_tokens), self.device)


def _can_be_lent_to(model: Any, cache: Any) -> bool:
    """Whether a slot can be put behind a cache: it holds nothing, and attention finds in GPU memory where it ends."""
    if not isinstance(cache, FastCache) or not cache.untouched:
        return False
    return bool(model.config._attn_implementation == ATTENTION_NAME and cache.attends_in_kernel)


def _wrap_sample() -> None:
    """Makes greedy and sampling generate() of patched models use our decode loop, where it can; other calls and models
    run transformers' own. On the class, since generate() looks nowhere else. Idempotent."""
    mixin: Any = GenerationMixin
    stock = mixin._sample
    if hasattr(stock, "_fastpath_wraps"):
        return

    @functools.wraps(stock)
    def sample(
        self: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        if synced_gpus or _why_stock_loop(self, input_ids, generation_config, model_kwargs):
            return stock(
                *(self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer),
                **model_kwargs,
            )
        return _decode(self, input_ids, logits_processor, stopping_criteria, generation_config, streamer, model_kwargs)

    sample._fastpath_wraps = stock  # type: ignore[attr-defined]
    mixin._sample = sample


def _why_stock_loop(model: Any, input_ids: torch.Tensor, generation_config: Any, model_kwargs: dict[str, Any]) -> str:
    """Why transformers' own loop has to decode; "" when ours does."""
    cache, graphs = model_kwargs.get("past_key_values"), getattr(getattr(model, "_fastpath", None), "graphs", None)
    if graphs is None or not isinstance(cache, FastCache) or graphs.slot_behind(cache) is None:
        return "no graph serves the cache"
    if generation_config.disable_compile or generation_config.is_assistant:
        return "graphs are not wanted"
    if generation_config.output_attentions or generation_config.output_hidden_states:
        return "more than logits is wanted"
    given = [name for name, value in model_kwargs.items() if value is not None and value is not False]
    if other := [name for name in given if name not in _LOOP_INPUTS]:
        return f"there are inputs {other}"
    positions = model_kwargs.get("position_ids")
    if positions is None or positions.dim() != 2 or model_kwargs.get("logits_to_keep", 1) not in (0, 1):
        return "positions or logits are special"
    if input_ids.device != model.device or not model_kwargs.get("use_cache", True):
        return "the tokens are on another device, or nothing is cached"
    return str(graphs.why_not_now(model, cache))


def _decode(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    config: Any,
    streamer: Any,
    model_kwargs: dict[str, Any],
) -> Any:
    """``GenerationMixin._sample`` by :func:`hf_fastpath.decode_loop.decode`."""
    cache = model_kwargs["past_key_values"]
    wants_more, ends = (
        config.return_dict_in_generate,
        [criterion.eos_token_id for criterion in stopping_criteria if hasattr(criterion, "eos_token_id")],
    )
    rule = Rule(
        do_sample=config.do_sample,
        processors=logits_processor,
        criteria=stopping_criteria,
        max_length=stopping_criteria.max_length,
        end=ends[0].to(input_ids.device) if ends else None,
        pad=None if config._pad_token_tensor is None else config._pad_token_tensor.to(input_ids.device),
        keep_scores=wants_more and config.output_scores,
        keep_logits=wants_more and config.output_logits,
    )
    returned = wants_more or getattr(cache, "_is_user_defined", False)
    # What is not transformers' own may count its calls, and some caches cannot forget a token.
    own = all(type(part).__module__.startswith("transformers.") for part in (*logits_processor, *stopping_criteria))
    decoded = decode(
        model,
        slot_of=model._fastpath.graphs.slot_of,
        prompt=input_ids,
        prefill=lambda: model._prefill(input_ids, config, model_kwargs, is_first_iteration=True),
        rule=dataclasses.replace(rule, key=_key_of(rule), filters=filters_of(logits_processor)),
        inputs=model_kwargs,
        streamer=streamer,
        lag=1 if own and (cache.can_forget or not returned) else 0,
    )
    if not wants_more:
        return decoded.sequences
    made: Any = decoded
    return GenerateDecoderOnlyOutput(
        sequences=made.sequences, scores=made.scores, logits=made.logits, past_key_values=cache
    )


def _key_of(rule: Rule) -> Any:
    """What ``rule.key`` is to be."""
    if rule.keep_scores or rule.keep_logits or any(type(c) not in _SIMPLE_CRITERIA for c in rule.criteria):
        return None
    settings = settings_of(rule.processors, tuple(_FILTERS))
    ends = [criterion for criterion in rule.criteria if type(criterion) is EosTokenCriteria]
    if settings is None or len(ends) > 1 or (ends and rule.pad is None):
        return None
    end = None if rule.end is None or rule.pad is None else (*rule.end.flatten().tolist(), rule.pad.item())
    return rule.do_sample, settings, end


def filters_of(processors: Any) -> Filters | None:
    """What one op does in the place of logits processors; None when there are others, or they are in another order."""
    known = list(_FILTERS)
    if any(type(processor) not in known for processor in processors):
        return None
    places = [known.index(type(processor)) for processor in processors]
    if places != sorted(set(places)):
        return None
    if any(getattr(processor, "filter_value", -torch.inf) != -torch.inf for processor in processors):
        return None
    if any(getattr(processor, "min_tokens_to_keep", 1) != 1 for processor in processors):
        return None
    names = [_FILTERS[type(processor)] for processor in processors]
    return Filters(**{name: getattr(processor, name) for name, processor in zip(names, processors, strict=True)})


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
