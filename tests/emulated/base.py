"""What the families of emulated ops share."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from emulator import INPUT, library


class EmulatedKernels:
    """The kernels, and how the emulator runs them."""

    def __init__(self, sm_count: int = 3) -> None:
        self._library = library()
        self.sm_count = sm_count  # few: so that a CTA takes several row blocks of a small shape

    def limit_shared_memory(self, bytes_: int) -> None:
        """To what a CTA can have on another GPU."""
        self._library.entry("emulator_set_shared_limit")(bytes_)

    def assume_written_since(self, amount: int) -> None:
        """What kernels read early (load_early()) is so much less than what they read in the end."""
        self._library.entry("emulator_set_written_since")(amount)

    def run_ctas_in_order(self, order: int) -> None:
        """0: as they are numbered, 1: the last one first, other numbers: by chance."""
        self._library.entry("emulator_set_cluster_order")(order)

    def _floats(self, entry_name: str, *sizes: int) -> int:
        entry = self._library.entry(entry_name)
        entry.restype = ctypes.c_int64
        return int(entry(*map(ctypes.c_int64, sizes)))


def new_tokens(new: Sequence[Any], capacity: int, lengths: torch.Tensor | None) -> list[Any]:
    """The arguments of an entry that are NEW_TOKENS, of what an appending op begins with."""
    query, key, value, q_norm, k_norm, eps, cos, sin, rotate, query_out = new
    batch, kv_heads, tokens, dim = key.shape
    heads = kv_heads if query is None else query.shape[1]
    turned = () if cos is None else (cos, sin)
    angles = [
        arg
        for angle in turned or (None, None)
        for arg in ((None, 0, 0) if angle is None else (angle, angle.stride(0) * (len(angle) > 1), angle.stride(1)))
    ]
    return [
        *(None if query is None else query, *((0, 0, 0) if query is None else query.stride()[:3])),
        *(key, *key.stride()[:3], value, *value.stride()[:3], query_out, q_norm, k_norm, float(eps), *angles),
        *(cos.shape[-1] if turned else 0, rotate, batch, heads, kv_heads, tokens, dim, capacity, lengths),
        query_out is not None and query_out.transpose(1, 2).is_contiguous(),
    ]


def new_inputs(new: Sequence[Any]) -> dict[str, tuple[torch.Tensor | None, int]]:
    query, key, value, q_norm, k_norm, _, cos, sin, *_ = new
    return inputs_of(query=query, key=key, value=value, q_norm=q_norm, k_norm=k_norm, cos=cos, sin=sin)


def mask_args(mask: torch.Tensor | None) -> tuple[torch.Tensor | None, int, int]:
    """A mask, its row stride and its columns."""
    return (None, 0, 0) if mask is None else (mask, mask.stride(0), mask.shape[1])


def inputs_of(**tensors: torch.Tensor | None) -> dict[str, tuple[torch.Tensor | None, int]]:
    return {name: (tensor, INPUT) for name, tensor in tensors.items()}
