"""Decoder layers that run new tokens by a :class:`hf_fastpath.modules.decoder_step.DecoderStep`, and what it is not for
as transformers does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from transformers.activations import ACT2FN
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from hf_fastpath import heuristics
from hf_fastpath.caches import CompressedLayer, FastCache
from hf_fastpath.caches.attention import ATTENTION_NAME, attend_short_prompt, fastpath_attention, why_not_ours
from hf_fastpath.caches.static import StaticKVLayer
from hf_fastpath.model_watch import first_hooked, identities
from hf_fastpath.modules.decoder_step import DecoderParts, DecoderStep, FeedForwardParts, StepCache
from hf_fastpath.modules.merged import Norm

SILU = type(ACT2FN["silu"])
ATTENTION: dict[str, Callable[..., Any]] = {"sdpa": sdpa_attention_forward, ATTENTION_NAME: fastpath_attention}


class _Watched:
    """A layer's step, and what it is made of: a replaced module or tensor shows, and so does a hook."""

    def __init__(self, layer: FusedLayer) -> None:
        self.step = None if layer.why_not(layer) else layer.make_step()
        self.experts = layer.make_experts_step()
        self.norm_weight = layer.first_norm.weight
        self.dtype = self.norm_weight.dtype
        self.modules = [module for module in layer.modules() if module is not layer]
        self.tables: list[dict[str, Any]] = [layer._modules]
        for module in self.modules:
            self.tables += [module._modules, module._parameters, module._buffers]
        self.content = [value for table in self.tables for value in table.values()]  # which keeps it alive
        self.identities = identities(self.tables)

    @property
    def unchanged(self) -> bool:
        if self.norm_weight.dtype is not self.dtype or (self.step is not None and self.step.moved):
            return False  # .to() changes parameters in place
        return identities(self.tables) == self.identities

    @property
    def hooked(self) -> bool:
        """Whether anybody wants to see or change what goes on inside the layer. transformers' own hooks, for
        ``output_attentions``, do not: they find nothing where attention is ours."""
        return torch_module._has_any_global_hook() or first_hooked(self.modules) is not None


class FusedLayer(nn.Module):
    """The forward pass of a mixin; the other base class is the family's decoder layer.

    ``kinds``: its attention, feed-forward and norm. A layer with others is not its kind.
    """

    kinds: tuple[type[nn.Module], type[nn.Module], type[nn.Module]]
    self_attn: Any
    mlp: Any
    input_layernorm: Any

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """``(batch, T, hidden_size)`` to the same."""
        if position_embeddings is not None and self._takes(hidden_states, past_key_values):
            arguments = (hidden_states, position_embeddings, attention_mask, past_key_values)
            out = self._attention_step(*arguments, {"position_ids": position_ids, **kwargs})
        else:
            out = None
        if out is None:
            out = super().forward(
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        return out

    def _attention_step(
        self,
        hidden: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
        cache: Any,
        kwargs: dict[str, Any],
    ) -> torch.Tensor | None:
        """The output of a layer with attention; None where the layer's own forward has to run."""
        attention = self.self_attn
        if attention.training or not self._rows_fit(hidden, position_embeddings[0]):
            return None
        if hidden.shape[1] == 1:
            cache_layer = self._cache_layer(hidden, mask, cache, kwargs)
            step = None if cache_layer is None else self._ready_step(hidden.dtype)
            if step is None:
                return None
            row_mask = None if mask is None else mask[:, 0, 0]
            out = step(hidden[:, 0].contiguous(), *position_embeddings, cache_layer, row_mask)
            return cast(torch.Tensor, out.unsqueeze(1))
        implementation = attention.config._attn_implementation
        step = self._ready_step(hidden.dtype) if implementation in ATTENTION else None
        if step is None:
            return None

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            index, scaling = attention.layer_idx, attention.scaling
            keys, values = cache.update(key, value, index)
            if implementation == ATTENTION_NAME:
                short = attend_short_prompt(cache.layers[index], query, keys, values, mask, scaling, kwargs)
                if short is not None:
                    return short
            function = ATTENTION[implementation]
            return cast(torch.Tensor, function(attention, query, keys, values, mask, scaling=scaling, **kwargs)[0])

        return cast(torch.Tensor, step.prompt(hidden, *position_embeddings, attend))

    def prepare(self) -> None:
        """Merges the weights now, not in the first step."""
        self.__dict__["_watched"] = _Watched(self)

    def keeps_row_bits(self, rows: int) -> bool:
        """Whether new tokens, of up to ``rows`` rows, are a step of ours all through: see
        :func:`hf_fastpath.spare_rows.keeps_row_bits`."""
        norm = self.first_norm.weight
        if not heuristics.fuses_decoder_step(norm.device.type) or (norm.is_cuda and not self._heads_fit()):
            return False
        step = self._ready_step(norm.dtype)
        return step is not None and bool(step.keeps_row_bits(rows))

    def _heads_fit(self) -> bool:
        """As :meth:`_rows_fit`, before there are rows; False where only a part of a head is turned."""
        attention = getattr(self, "self_attn", None)
        if attention is None:
            return True
        rope = getattr(attention.config, "rope_parameters", None) or {}
        whole = rope.get("partial_rotary_factor") in (None, 1.0)
        size = attention.head_dim
        return whole and heuristics.kv_append_supports(size) and heuristics.rope_supports(size)

    def forget(self) -> None:
        """Undoes what :meth:`prepare` and steps have left, but for the layout of packed weights in memory."""
        watched = self.__dict__.pop("_watched", None)
        if watched is not None and watched.step is not None:
            watched.step.release()

    @property
    def first_norm(self) -> Any:
        """The norm that the layer begins with."""
        return self.input_layernorm

    def make_step(self) -> Any:
        """The step, of a layer that :meth:`why_not` has nothing against."""
        return DecoderStep(self.parts_of())

    def make_experts_step(self) -> Any:
        """The step of the layer's mixture of experts; None: it has none, or they run themselves."""
        return None

    def parts_of(self) -> DecoderParts:
        """What the layer consists of."""
        attention, mlp = self.self_attn, self.mlp
        return DecoderParts(
            qkv=[attention.q_proj, attention.k_proj, attention.v_proj],
            out=attention.o_proj,
            feed_forward=FeedForwardParts(
                [mlp.gate_proj, mlp.up_proj], mlp.down_proj, norm_of(self.post_attention_layernorm)
            ),
            input_norm=norm_of(self.input_layernorm),
            q_norm=norm_of(attention.q_norm) if hasattr(attention, "q_norm") else None,
            k_norm=norm_of(attention.k_norm) if hasattr(attention, "k_norm") else None,
            head_dim=attention.head_dim,
            scaling=attention.scaling,
        )

    @classmethod
    def why_not(cls, layer: Any) -> str:
        """Why a decoder layer is not run so; "" when it is."""
        attention, mlp, norm = cls.kinds
        expected = {"self_attn": attention, "mlp": mlp, "input_layernorm": norm, "post_attention_layernorm": norm}
        expected |= {"self_attn.q_norm": norm, "self_attn.k_norm": norm, "mlp.act_fn": SILU}
        for name, module in layer.named_modules():
            if name in expected and type(module) is not expected[name]:
                return f"its {name} is a {type(module).__name__}, no {expected[name].__name__}"
        return FusedLayer.parts_of(layer).why_not()

    def _cache_layer(
        self, hidden: torch.Tensor, mask: torch.Tensor | None, cache: Any, kwargs: dict[str, Any]
    ) -> StepCache | None:
        """The layer of the cache that one new token a row attends to in a kernel; None where none does that."""
        attention = self.self_attn
        if why_not_ours(hidden.shape[:2], mask, kwargs):
            return None
        layer, implementation = cache.layers[attention.layer_idx], attention.config._attn_implementation
        if isinstance(layer, StaticKVLayer):
            supported = not hidden.is_cuda or heuristics.attn_decode_supports(attention.head_dim)
            return layer if implementation in ATTENTION and supported else None
        return layer if isinstance(layer, CompressedLayer) and implementation == ATTENTION_NAME else None

    def _rows_fit(self, hidden: torch.Tensor, cos: torch.Tensor) -> bool:
        """Whether the kernels take rows of these heads; the references take any."""
        supported = heuristics.kv_append_supports(self.self_attn.head_dim) and heuristics.rope_supports(cos.shape[-1])
        return supported or not hidden.is_cuda

    def _takes(self, hidden: torch.Tensor, cache: Any) -> bool:
        """Whether these are new tokens for a cache of ours, where steps are worth it and nobody trains."""
        return (
            heuristics.fuses_decoder_step(hidden.device.type)
            and not torch.is_grad_enabled()
            and not self.training
            and isinstance(cache, FastCache)
            and not cache.offloading
        )

    def _ready_step(self, dtype: torch.dtype) -> Any:
        watched = self.__dict__.get("_watched")
        if watched is None or not watched.unchanged:
            self.prepare()
            watched = self.__dict__["_watched"]
        if watched.step is None or watched.dtype is not dtype or watched.hooked:
            return None
        return watched.step

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_watched"}


def norm_of(module: Any) -> Norm:
    """An RMSNorm of transformers'."""
    return Norm(module.weight, module.variance_epsilon)


class FusedLlamaDecoderLayer(FusedLayer, llama.LlamaDecoderLayer):
    """What a ``LlamaDecoderLayer`` becomes."""

    kinds = (llama.LlamaAttention, llama.LlamaMLP, llama.LlamaRMSNorm)


class FusedMistralDecoderLayer(FusedLayer, mistral.MistralDecoderLayer):
    """What a ``MistralDecoderLayer`` becomes."""

    kinds = (mistral.MistralAttention, mistral.MistralMLP, mistral.MistralRMSNorm)


class FusedQwen2DecoderLayer(FusedLayer, qwen2.Qwen2DecoderLayer):
    """What a ``Qwen2DecoderLayer`` becomes."""

    kinds = (qwen2.Qwen2Attention, qwen2.Qwen2MLP, qwen2.Qwen2RMSNorm)


class FusedQwen3DecoderLayer(FusedLayer, qwen3.Qwen3DecoderLayer):
    """What a ``Qwen3DecoderLayer`` becomes."""

    kinds = (qwen3.Qwen3Attention, qwen3.Qwen3MLP, qwen3.Qwen3RMSNorm)


FUSED_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    llama.LlamaDecoderLayer: FusedLlamaDecoderLayer,
    mistral.MistralDecoderLayer: FusedMistralDecoderLayer,
    qwen2.Qwen2DecoderLayer: FusedQwen2DecoderLayer,
    qwen3.Qwen3DecoderLayer: FusedQwen3DecoderLayer,
}
