"""LFM2's decoder layers, with a short convolution or attention and a dense feed-forward or experts, that run new
tokens in few kernels. Experts of other kinds than ours are run by their own modules."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import nn

from hf_fastpath.caches.conv_state import ConvStateLayer
from hf_fastpath.modules.conv_step import ConvParts, ConvStep
from hf_fastpath.modules.decoder_step import DecoderParts, DecoderStep, FeedForwardParts
from hf_fastpath.modules.experts16 import Experts16
from hf_fastpath.modules.moe_router import MoERouter
from hf_fastpath.modules.moe_step import MoEParts, MoEStep
from hf_fastpath.modules.packed_experts import PackedExperts
from hf_fastpath.patches.decoder_layers import FusedLayer, norm_of


class Lfm2Kinds(NamedTuple):
    """The classes of a family's parts; ``convolutions`` also what ours becomes. sparse: a router and experts."""

    attention: type[nn.Module]
    convolutions: tuple[type[nn.Module], ...]
    dense: type[nn.Module]
    norm: type[nn.Module]
    sparse: type[nn.Module] | None = None


class FusedLfm2Layer(FusedLayer):
    """The forward pass of a mixin; the other base class is the family's decoder layer."""

    lfm2_kinds: Lfm2Kinds
    is_attention_layer: bool
    conv: Any
    feed_forward: Any
    operator_norm: Any
    ffn_norm: Any

    def forward(  # type: ignore[override]  # the arguments of another family
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """``(batch, T, hidden_size)`` to the same."""
        out = None
        if self._takes(hidden_states, past_key_values):
            if not self.is_attention_layer:
                out = self._convolution_step(hidden_states, attention_mask, past_key_values, kwargs)
            elif position_embeddings is not None:
                arguments = (hidden_states, position_embeddings, attention_mask, past_key_values)
                out = self._attention_step(*arguments, {"position_ids": position_ids, **kwargs})
        if out is None:
            out = super(FusedLayer, self).forward(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
            return out
        watched = self.__dict__["_watched"]
        if watched.step.parts.feed_forward is not None:
            return out
        if watched.experts is None:
            return out + cast(torch.Tensor, self.feed_forward(self.ffn_norm(out)))
        return cast(torch.Tensor, watched.experts(out.reshape(-1, out.shape[-1])).view(out.shape))

    def make_experts_step(self) -> MoEStep | None:
        block: Any = self.feed_forward
        ours = type(block) is self.lfm2_kinds.sparse and isinstance(block.gate, MoERouter)
        if not ours or not isinstance(block.experts, (PackedExperts, Experts16)):
            return None
        bias = block.expert_bias if block.use_expert_bias else None
        return MoEStep(MoEParts(block.gate, bias, block.experts, norm_of(self.ffn_norm)))

    def keeps_row_bits(self, rows: int) -> bool:
        if not super().keeps_row_bits(rows):
            return False
        watched = self.__dict__["_watched"]
        if watched.step.parts.feed_forward is not None:
            return True
        return watched.experts is not None and bool(watched.experts.keeps_row_bits(rows))

    def _convolution_step(
        self, hidden: torch.Tensor, mask: torch.Tensor | None, cache: Any, kwargs: dict[str, Any]
    ) -> torch.Tensor | None:
        """The output of a layer with a convolution, as far as the step goes; None where the layer's own forward has to
        run."""
        layer = cache.layers[self.conv.layer_idx]
        if kwargs.get("seq_idx") is not None or not isinstance(layer, ConvStateLayer) or layer.record_past:
            return None
        # Under autocast what a projection puts out has another dtype than what the state is made for.
        step = None if torch.is_autocast_enabled(hidden.device.type) else self._ready_step(hidden.dtype)
        if step is None:
            return None
        state = layer.ready((hidden.shape[0], *step.state_shape), hidden)
        if hidden.shape[1] == 1:
            return cast(torch.Tensor, step(hidden[:, 0].contiguous(), state, layer.padding.mask).unsqueeze(1))
        padding = None if mask is None else mask.bool()
        return cast(torch.Tensor, step.prompt(hidden, state, padding, layer.in_kernel))

    @property
    def first_norm(self) -> Any:
        return self.operator_norm

    def make_step(self) -> ConvStep | DecoderStep:
        parts = _parts(self, self.lfm2_kinds)
        return ConvStep(parts) if isinstance(parts, ConvParts) else DecoderStep(parts)

    @classmethod
    def why_not(cls, layer: Any) -> str:
        kinds = cls.lfm2_kinds
        expected: dict[str, tuple[type[nn.Module], ...]] = {"self_attn": (kinds.attention,), "conv": kinds.convolutions}
        norms = ("operator_norm", "ffn_norm", "self_attn.q_layernorm", "self_attn.k_layernorm")
        expected |= {name: (kinds.norm,) for name in norms}
        for name, module in layer.named_modules():
            if name in expected and type(module) not in expected[name]:
                return f"its {name} is a {type(module).__name__}, no {expected[name][0].__name__}"
        return _parts(layer, kinds).why_not()


def _parts(layer: Any, kinds: Lfm2Kinds) -> ConvParts | DecoderParts:
    """What a layer consists of, patched or not yet."""
    mlp, norm = layer.feed_forward, norm_of(layer.operator_norm)
    feed_forward = None
    if type(mlp) is kinds.dense:
        mlp = cast(Any, mlp)
        feed_forward = FeedForwardParts([mlp.w1, mlp.w3], mlp.w2, norm_of(layer.ffn_norm))
    if not layer.is_attention_layer:
        conv = layer.conv
        return ConvParts(conv.in_proj, conv.out_proj, conv.conv.weight, conv.conv.bias, norm, feed_forward)
    attention = layer.self_attn
    return DecoderParts(
        qkv=[attention.q_proj, attention.k_proj, attention.v_proj],
        out=attention.out_proj,
        feed_forward=feed_forward,
        input_norm=norm,
        q_norm=norm_of(attention.q_layernorm),
        k_norm=norm_of(attention.k_layernorm),
        head_dim=attention.head_dim,
        scaling=attention.scaling,
    )
