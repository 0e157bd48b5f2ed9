"""The attention function ``"fastpath"``: decodes from compressed caches in a kernel, and is sdpa otherwise."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hf_fastpath import heuristics
from hf_fastpath.caches.compressed import CompressedLayer
from hf_fastpath.caches.lazy import LazyKV
from hf_fastpath.caches.static import StaticKVLayer
from hf_fastpath.errors import Unsupported
from hf_fastpath.runtime import is_capturing

ATTENTION_NAME = "fastpath"


def register_attention() -> None:
    """Makes ``attn_implementation="fastpath"`` known to transformers. Idempotent."""
    AttentionInterface.register(ATTENTION_NAME, fastpath_attention)
    # Without a mask function of its own, transformers would drop the padding mask.
    AttentionMaskInterface.register(ATTENTION_NAME, fastpath_mask)


def fastpath_mask(
    q_length: int,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> torch.Tensor | None:
    """transformers' mask function for :func:`fastpath_attention`: ``sdpa_mask``, but that one new token a row gets none
    while a CUDA graph is captured either, which would hold the length of that moment."""
    if q_length == 1 and allow_is_causal_skip and attention_mask is None and local_size is None:
        return None
    kwargs |= {"q_length": q_length, "attention_mask": attention_mask, "local_size": local_size}
    return sdpa_mask(allow_is_causal_skip=allow_is_causal_skip, **kwargs)


def fastpath_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' attention call: query ``(B, H, q, D)``, key and value ``(B, H_kv, kv, D)`` or LazyKV handles.

    Returns ``(B, q, H, D)`` and None (no attention weights, as sdpa).
    """
    if type(key) is LazyKV and type(value) is LazyKV:
        layer = key.layer
        if isinstance(layer, (CompressedLayer, StaticKVLayer)):
            reason = _why_not_ours(query, attention_mask, dropout, kwargs)
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            if isinstance(layer, CompressedLayer) and layer.attends_chunks:
                if reason:
                    raise Unsupported(f"the {layer.format} KV cache cannot serve this call: {reason}")
                mask = None if attention_mask is None else attention_mask[:, 0]
                return layer.attend(query, mask, scale).transpose(1, 2).contiguous(), None
            if not reason and query.shape[2] == 1:
                mask = None if attention_mask is None else attention_mask[:, 0, 0]
                return layer.decode(query[:, :, 0], mask, scale).unsqueeze(1), None
            if not reason and isinstance(layer, CompressedLayer):
                return layer.attend_chunk(query, attention_mask, scale).transpose(1, 2).contiguous(), None
        if is_capturing(query.device):
            raise Unsupported("a CUDA graph cannot hold a KV cache that is expanded: it would have the length of now")
        key, value = key.expand_now(), value.expand_now()
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def attend_short_prompt(
    layer: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    kwargs: dict[str, Any],
) -> torch.Tensor | None:
    """What :func:`fastpath_attention` computes for a compressed cache's first tokens, ``(B, T, H, D)``, by the kernel
    that takes the host least; None where there are many, or a mask, or others before them, where a compiler is to see
    it, and where flash attention was turned off (``torch.nn.attention.sdpa_kernel``).

    The rest of a short prompt waits for the host, and through sdpa a layer's attention takes that as long as all four
    of its products. Without gradients and dropout.
    """
    if attention_mask is not None or type(key) is not torch.Tensor or not isinstance(layer, CompressedLayer):
        return None
    tokens, size = query.shape[2:]
    if key.shape[2] != tokens or not heuristics.is_short_prompt(query.device.type, query.dtype, tokens, size):
        return None
    if torch.compiler.is_compiling() or not torch.backends.cuda.flash_sdp_enabled():
        return None
    if why_not_ours((query.shape[0], tokens), None, kwargs):
        return None
    attended = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, False, scale=scaling)
    return cast(torch.Tensor, attended[0].transpose(1, 2))  # its own layout


def _why_not_ours(
    query: torch.Tensor, attention_mask: torch.Tensor | None, dropout: float, kwargs: dict[str, Any]
) -> str:
    """Why a cache cannot attend by itself; "" when no gradient is wanted, and there is at most a mask over the tokens
    that all heads share."""
    if query.requires_grad and torch.is_grad_enabled():
        return "gradients are wanted; call the model within torch.no_grad()"
    if dropout:
        return "attention dropout is on; call model.eval()"
    return why_not_ours((query.shape[0], query.shape[2]), attention_mask, kwargs)


def why_not_ours(shape: tuple[int, ...], attention_mask: torch.Tensor | None, kwargs: dict[str, Any]) -> str:
    """The same, as far as it hangs on the number of rows and new tokens, ``shape``, and on what else the attention
    function is called with."""
    if kwargs.get("softcap") is not None or kwargs.get("position_bias") is not None:
        return "the model caps its attention scores or adds to them"
    if kwargs.get("is_causal") is False:
        return "its attention is not causal"
    if attention_mask is None:
        return ""
    shared = attention_mask.dim() == 4 and attention_mask.shape[:3] == (shape[0], 1, shape[1])
    if shared and attention_mask.dtype == torch.bool:
        return ""
    return "the attention mask is not a boolean one that all heads share"
