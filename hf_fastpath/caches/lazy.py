"""A tensor that stands for the keys or values of a compressed cache layer and expands them only if somebody computes
with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_map


class ExpandableLayer(Protocol):
    """What a cache layer offers to a :class:`LazyKV` handle."""

    def expand(self, which: str, length: int, dtype: torch.dtype) -> torch.Tensor:
        """``"keys"`` or ``"values"``, the first ``length`` tokens, ``(B, H_kv, length, D)``."""


class LazyKV(torch.Tensor):
    """What ``update()`` of a compressed cache returns: our attention function reads ``layer``'s storage in a kernel;
    any other code (sdpa, eager attention, a user's hook) computes with the expanded tensor and stays correct."""

    layer: ExpandableLayer
    which: str

    # Without this every call would also go through Python's __torch_function__ protocol, for nothing.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, layer: ExpandableLayer, which: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> LazyKV:
        handle = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        handle.layer, handle.which = layer, which
        return handle

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def expand_now(self) -> torch.Tensor:
        """The plain tensor this handle stands for, newly allocated."""
        return self.layer.expand(self.which, self.shape[2], self.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyKV({self.which}, shape={tuple(self.shape)}, dtype={self.dtype}, device={str(self.device)!r})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def plain(value: Any) -> Any:
            return value.expand_now() if isinstance(value, LazyKV) else value

        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))
