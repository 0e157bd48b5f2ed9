"""The H2O cache: a fixed number of tokens a head, in 8-bit floats; the one that got the least attention goes."""

from __future__ import annotations

import torch
from transformers.configuration_utils import PreTrainedConfig

from hf_fastpath.caches.compressed import CompressedCache, CompressedLayer
from hf_fastpath.config import KV_BUDGET, KV_SINKS, check_budget
from hf_fastpath.errors import Unsupported
from hf_fastpath.ops._append import ROTATED, QKTransform
from hf_fastpath.ops._rotation import rotate
from hf_fastpath.ops.attn_decode_h2o import attn_decode_h2o
from hf_fastpath.ops.attn_prefill_h2o import attn_prefill_h2o
from hf_fastpath.ops.kv_fp8_append import FP8
from hf_fastpath.ops.kv_h2o_append import kv_h2o_append


class H2OKVLayer(CompressedLayer):
    """``storage``, N being the slots (``budget``); which token a slot holds is each head's own affair:

    k_data (rotated), v_data: E4M3 ``(B, H_kv, N, D)``; k_scale, v_scale: float16 ``(B, H_kv, N)``, powers of two:
    a key is ``k_data * k_scale``.

    scores: float32 ``(B, H_kv, N)``, the attention that the slot's token got so far, from all query heads that read the
    KV head.

    positions: int32 ``(B, H_kv, N)``, the number of the slot's token among all that there were.

    counts: int32 ``(B, H_kv, 2)``: tokens that there were, and the number of the first one that is no padding. The
    first ``min(tokens, N)`` slots are in use, in no order. Each head has a copy, as of ``lengths`` of other formats.

    All are contiguous; a slot's data is aligned to 16 bytes when D is a multiple of 16.
    """

    format = "h2o"
    tokens_per_entry = (1, 1, 1, 1, 1, 1, 0)
    is_croppable = False
    attends_chunks = True
    option_names = (*CompressedLayer.option_names, "budget", "window", "sinks")

    def __init__(
        self,
        initial_tokens: int = 0,
        fresh_prefill: bool = True,
        reference: bool = False,
        budget: int = KV_BUDGET,
        window: int = KV_BUDGET // 2,
        sinks: int = KV_SINKS,
    ) -> None:
        super().__init__(initial_tokens, fresh_prefill, reference)
        self.budget, self.window, self.sinks = budget, window, sinks
        self._fresh: tuple[torch.Tensor, torch.Tensor] | None = None

    def why_no_kernel(self, head_dim: int) -> str:
        if self.budget % 16 == 0:
            return super().why_no_kernel(head_dim)
        return f"the h2o KV cache on CUDA needs a kv_budget that is a multiple of 16, not {self.budget}"

    def new_storage(self, key: torch.Tensor, capacity: int) -> list[torch.Tensor]:
        slots = (*key.shape[:2], self.budget)
        one = (((*slots, key.shape[3]), FP8), (slots, torch.float16))
        kinds = (*one, *one, (slots, torch.float32), (slots, torch.int32), ((*slots[:2], 2), torch.int32))
        return [torch.zeros(shape, dtype=dtype, device=key.device) for shape, dtype in kinds]

    def write(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keeps the new tokens aside: what stays is known when they have attended."""
        self._require_none_aside()
        self._fresh = key, value

    def _require_none_aside(self) -> None:
        if self._fresh is not None:
            raise Unsupported(
                "the h2o KV cache got new tokens before those of the last call attended, which decides what it keeps: "
                + self._needs_attention()
            )

    @staticmethod
    def _needs_attention() -> str:
        return (
            "it needs attn_implementation='fastpath', which patch_model(model, kv_cache='h2o') sets; without patching, "
            "call hf_fastpath.register() and model.set_attn_implementation('fastpath')"
        )

    def _reserve(self, used: int) -> None:
        """There is never more room."""

    def has_room(self, tokens: int) -> bool:
        return True

    def read(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._handles(key)

    def attend(self, query: torch.Tensor, mask: torch.Tensor | None, scaling: float) -> torch.Tensor:
        """Attention of the tokens of the last ``update()``, which the cache then holds, as far as they stay.

        Args:
            query: ``(B, H, q, D)``, the result alike. mask: bool ``(B, q, length)``; None: causal.
        """
        assert self._fresh is not None
        (key, value), self._fresh = self._fresh, None
        tokens = key.shape[2]
        if tokens > 1 and self.fresh_prefill:
            start = self.length - tokens
            q, k = rotate(query), rotate(key)  # as the stored keys are
            return attn_prefill_h2o(
                q, k, value, self.storage, mask, start, scaling, self.window, self.sinks, reference=self.reference
            )
        out = []
        for i in range(tokens):
            row = None if mask is None else mask[:, i]
            q, k, v = (x[:, :, i : i + 1] for x in (query, key, value))
            ready = self.append(k, v, ROTATED, q)
            assert ready is not None
            out.append(self.attend_stored(ready.squeeze(2), row, scaling))
        return torch.stack(out, dim=2)

    def append(
        self, key: torch.Tensor, value: torch.Tensor, transform: QKTransform, query: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        rule = (self.window, self.sinks)
        return kv_h2o_append(key, value, self.storage, *rule, transform, query, reference=self.reference)

    def attend_stored(self, query: torch.Tensor, mask: torch.Tensor | None, scaling: float) -> torch.Tensor:
        return attn_decode_h2o(query, self.storage, mask, scaling, tickets=self.tickets, reference=self.reference)

    def step(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        transform: QKTransform,
        mask: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        self._require_none_aside()
        return super().step(query, key, value, transform, mask, scaling)

    def decode(self, query: torch.Tensor, mask: torch.Tensor | None, scaling: float) -> torch.Tensor:
        return self.attend(query.unsqueeze(2), None if mask is None else mask.unsqueeze(1), scaling).squeeze(2)

    def reset(self) -> None:
        super().reset()  # which sets the counts to 0
        self._fresh = None

    def crop(self, tokens_to_remove: int) -> None:
        if int(tokens_to_remove) and self.length:
            raise Unsupported(
                "the h2o KV cache cannot forget its latest tokens: others were evicted for them. Assisted decoding and "
                "prompt lookup need that; use another kv_cache"
            )

    def bytes_per_head(self, head_dim: int, dtype: torch.dtype) -> float:
        return 2 * (head_dim + 2) + 8

    def expand_stored(self, which: str, tokens: slice, dtype: torch.dtype) -> torch.Tensor:
        return self.expand(which, tokens.stop, dtype)

    def expand(self, which: str, length: int, dtype: torch.dtype) -> torch.Tensor:
        raise Unsupported(
            "the h2o KV cache holds other tokens in each head, and goes by the attention that they get, so no other "
            "attention can read it: " + self._needs_attention()
        )


class H2OKVCache(CompressedCache):
    """A fixed number of tokens a head, in E4M3 with a scale a token: the first few, the latest ones, and of the others
    those that got the most attention (H2O, Zhang et al., 2023). Memory and time of a token stop growing there.

    It needs ``attn_implementation="fastpath"``, and no ``crop()``: no assisted decoding, no prompt lookup. What was
    evicted is forgotten for good: answers that need it are lost.

    Args:
        config: see :class:`FastCache`.
        kv_budget: tokens that are kept in each head.
        kv_window: so many of the latest ones are kept whatever they get; None: half of the budget.
        kv_sinks: so many of the first ones are kept too; padding is none.
        max_cache_len: not used, the budget is the room.
        fresh_prefill: attend to a prompt in one go, and evict afterwards. With False each token is appended by itself,
            as in decoding: what a perplexity needs that includes the cache's error.
        reference: see :class:`CompressedCache`.

    Raises:
        ValueError: the numbers do not fit together.
    """

    layer_class = H2OKVLayer
    # A window forgets by itself, and its mask would look like padding.
    layer_kinds = frozenset({"conv", "full_attention"})

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        kv_budget: int = KV_BUDGET,
        kv_window: int | None = None,
        kv_sinks: int = KV_SINKS,
        max_cache_len: int = 0,
        fresh_prefill: bool = True,
        reference: bool = False,
    ) -> None:
        super().__init__(
            config,
            max_cache_len=max_cache_len,
            fresh_prefill=fresh_prefill,
            reference=reference,
            budget=kv_budget,
            window=check_budget(kv_budget, kv_window, kv_sinks),
            sinks=kv_sinks,
        )
