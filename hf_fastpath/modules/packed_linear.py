"""What linear layers with packed weights share: gradients, files, and two layouts, the documented one and the CPU's."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import nn

from hf_fastpath.ops.w4a16_linear import MAX_ROWS


class _ProductWithGradient(torch.autograd.Function):
    """The packed product, which has no gradient of its own; backward expands the weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: PackedLinear) -> torch.Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grad_outputs
        return grad @ ctx.layer.dequantized_weight().to(grad.dtype), None


class PackedLinear(nn.Module):
    """``y = x W^T + b`` with a packed W.

    Inputs ``(..., in_features)`` in fp16 or bf16, on the CPU also fp32; the output has the input's dtype.

    On CUDA the weight lives in ``qweight``. On the CPU it lives in the layout of torch's own product instead
    (``cpu_layout``, made at the first call; never both). ``state_dict()`` always holds ``qweight``. Where gradients are
    wanted they flow to the input; the weight itself is frozen.
    """

    qweight: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.cpu_layout: tuple[torch.Tensor, ...] | None = None
        self.reference = False  # on CUDA: run the reference implementations

    def keeps_row_bits(self, rows: int) -> bool:
        """Whether up to ``rows`` rows run on a kernel of ours: see :func:`hf_fastpath.spare_rows.keeps_row_bits`."""
        return self.scales.is_cuda and not self.reference and rows <= MAX_ROWS

    @property
    @abstractmethod
    def layout(self) -> str:
        """The format in a few words, for reports."""

    @abstractmethod
    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """``(M, in_features)``, M >= 1, to ``(M, out_features)``."""

    @abstractmethod
    def dequantized_weight(self) -> torch.Tensor:
        """The float weight ``(out_features, in_features)`` in the dtype of ``scales``, columns in the input's order."""

    @abstractmethod
    def canonical_qweight(self) -> torch.Tensor:
        """``qweight`` in the documented layout, whichever layout the module holds at present."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            return _ProductWithGradient.apply(x, self)
        return self.product(x)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output, without a gradient."""
        rows = x.reshape(-1, self.in_features)
        out = self.multiply(rows) if rows.shape[0] else x.new_empty((0, self.out_features))
        return out.view(*x.shape[:-1], self.out_features)

    def hold_cpu_layout(self, cpu_layout: tuple[torch.Tensor, ...]) -> None:
        """From now on the codes are in ``cpu_layout``; ``qweight`` is emptied."""
        self.cpu_layout = cpu_layout
        self.qweight = self.qweight.new_empty((0, *self.qweight.shape[1:]))

    def to_canonical_layout(self) -> None:
        """Moves the codes back to ``qweight``, the layout that every device and file understands."""
        self.qweight, self.cpu_layout = self.canonical_qweight(), None

    @property
    def nbytes(self) -> int:
        """Bytes that this module holds now, in whichever layout."""
        held = [*self.buffers(), *(self.cpu_layout or ())]
        return sum(tensor.nbytes for tensor in held)

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        self.to_canonical_layout()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "qweight"] = self.canonical_qweight()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if prefix + "qweight" in state_dict:
            self.to_canonical_layout()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, {self.layout}, bias={self.bias is not None}"
