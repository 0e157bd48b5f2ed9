"""Write one new token a row into the H2O cache, in the place of the one that got the least attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hf_fastpath.ops import _append
from hf_fastpath.ops._slots import Slots, priorities, quantize_fp8_tokens

STORAGE = (
    "Tensor(a!) k_data, Tensor(b!) k_scale, Tensor(c!) v_data, Tensor(d!) v_scale, Tensor(e!) scores, "
    "Tensor(f!) positions, Tensor(g!) counts, int window, int sinks"
)


def _store(
    key: torch.Tensor,
    value: torch.Tensor,
    k_data: torch.Tensor,
    k_scale: torch.Tensor,
    v_data: torch.Tensor,
    v_scale: torch.Tensor,
    scores: torch.Tensor,
    positions: torch.Tensor,
    counts: torch.Tensor,
    window: int,
    sinks: int,
) -> None:
    seen, budget = Slots(k_data, k_scale, v_data, v_scale, scores, positions, counts).seen, k_data.shape[2]
    if seen < budget:
        slot = torch.full(scores.shape[:2], seen, device=scores.device)
    else:
        slot = priorities(scores, positions, counts[..., 1], seen, window, sinks).argmin(-1)
    rows = torch.arange(scores.shape[0], device=scores.device).unsqueeze(1)
    heads = torch.arange(scores.shape[1], device=scores.device)
    where = (rows, heads, slot)
    for x, data, scale in ((key, k_data, k_scale), (value, v_data, v_scale)):
        data[where], scale[where] = quantize_fp8_tokens(x[:, :, 0])
    scores[where], positions[where] = 0.0, seen
    counts[..., 0] += 1


_op, kv_h2o_append_reference = _append.define("kv_h2o_append", STORAGE, _store)


def kv_h2o_append(
    key: torch.Tensor,
    value: torch.Tensor,
    storage: Sequence[torch.Tensor],
    window: int,
    sinks: int,
    transform: _append.QKTransform = _append.NOTHING,
    query: torch.Tensor | None = None,
    *,
    reference: bool = False,
) -> torch.Tensor | None:
    """Writes a token into the next slot, or, when all are in use, into that of the token that is evicted.

    Evicted is, in each head, the token with the least attention in ``scores`` among those that are neither of the last
    ``window`` (the new one included) nor of the first ``sinks``; padding before any other; the lowest slot of several.

    Args:
        key, value: ``(B, H_kv, 1, D)``, any strides with a contiguous last dimension; fp16, bf16 (CPU also fp32).
        storage: that of :class:`hf_fastpath.caches.h2o.H2OKVLayer`, which describes it; more slots than ``window - 1``
            and ``sinks`` together.
        transform: what is done to the keys before they are quantized, and to the query.
        query: ``(B, H, 1, D)``, strides alike; None: nothing is returned.
        reference: run the reference implementation, on any device.

    Returns the query transformed, ``(B, H, 1, D)``, in memory as ``(B, 1, H, D)``.
    """
    append = kv_h2o_append_reference if reference else _op
    return _append.call(append, key, value, (*storage, window, sinks), transform, query)
