"""What stands between a layer's products."""

from __future__ import annotations

import torch
from emulator import OUTPUT

from emulated.base import EmulatedKernels, inputs_of


class EmulatedLayer(EmulatedKernels):
    """See :class:`emulated.EmulatedOps`."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self._norm(x, None, weight, eps)[1]

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._norm(x, residual, weight, eps)

    def _norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sums, y = (x.new_empty(x.shape) for _ in range(2))
        self._library.call(
            "emulated_rms_norm",
            *(x, x.stride(0), residual, weight, eps, sums, y, *x.shape, x.dtype is torch.bfloat16),
            **inputs_of(x=x, residual=residual, weight=weight),
            sums=(sums, OUTPUT),
            y=(y, OUTPUT),
        )
        return sums, y

    def swiglu(self, x: torch.Tensor) -> torch.Tensor:
        y = x.new_empty(x.shape[0], x.shape[1] // 2)
        self._library.call(
            "emulated_swiglu", x, y, *y.shape, x.dtype is torch.bfloat16, **inputs_of(x=x), y=(y, OUTPUT)
        )
        return y

    def embedding_rows(self, ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = weight.new_empty(ids.shape[0], weight.shape[1])
        self._library.call(
            "emulated_embedding_rows",
            *(ids, weight, y, weight.shape[0], ids.shape[0], weight.shape[1] // 8),
            **inputs_of(ids=ids, weight=weight),
            y=(y, OUTPUT),
        )
        return y

    def rope_angles(
        self, positions: torch.Tensor, inv_freq: torch.Tensor, scaling: float, like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = (like.new_empty(*positions.shape, 2 * inv_freq.shape[0]) for _ in range(2))
        self._library.call(
            "emulated_rope_angles",
            *(positions, inv_freq, scaling, cos, sin, positions.numel(), inv_freq.shape[0]),
            *(like.element_size(), like.dtype is torch.bfloat16),
            **inputs_of(positions=positions, inv_freq=inv_freq),
            cos=(cos, OUTPUT),
            sin=(sin, OUTPUT),
        )
        return cos, sin
