"""Write new keys and values into the full-precision cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hf_fastpath.ops import _append

STORAGE = "Tensor(a!) keys, Tensor(b!) values, Tensor(c!)? lengths"


def _store(
    key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor | None
) -> None:
    """Where the tokens go is never on the host: this serves GPUs too where the kernels cannot run."""
    if lengths is None:
        keys[:, :, : key.shape[2]], values[:, :, : key.shape[2]] = key, value
        return
    where = lengths[0, 0] + torch.arange(key.shape[2], device=key.device)
    keys.index_copy_(2, where, key)
    values.index_copy_(2, where, value)
    lengths += key.shape[2]


_op, kv_static_append_reference = _append.define("kv_static_append", STORAGE, _store)


def kv_static_append(
    key: torch.Tensor,
    value: torch.Tensor,
    storage: Sequence[torch.Tensor | None],
    transform: _append.QKTransform = _append.NOTHING,
    query: torch.Tensor | None = None,
    *,
    reference: bool = False,
) -> torch.Tensor | None:
    """Appends tokens and counts them in the storage's ``lengths``.

    Args:
        key: ``(B, H_kv, q, D)``, any strides with a contiguous last dimension, and value, whose last dimension may be
            another. On CUDA the kernel takes fp16 and bf16, values of the keys' shape, D a multiple of 8 up to 256.
        storage: that of :class:`hf_fastpath.caches.static.StaticKVLayer`, which describes it, with room for the tokens;
            in the place of ``lengths`` None: there are no tokens yet, and these are not counted.
        transform: what is done to the keys before, and to the query.
        query: ``(B, H, q, D)``, strides alike; None: nothing is returned.
        reference: run the reference implementation, on any device.

    Returns the query transformed, ``(B, H, q, D)``, in memory as ``(B, q, H, D)``. What is computed is bit-identical to
    transformers but for RMSNorm on CUDA, whose sum of squares is added in another order.
    """
    append = kv_static_append_reference if reference else _op
    return _append.call(append, key, value, storage, transform, query)
