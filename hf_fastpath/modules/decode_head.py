"""The end of a model, its last norm and its head, for the few rows of a decode step: one kernel each."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hf_fastpath import heuristics
from hf_fastpath.modules.logits_target import logits_target
from hf_fastpath.ops.linear_16bit import linear_16bit, linear_16bit_into
from hf_fastpath.ops.rms_norm import rms_norm
from hf_fastpath.runtime import gpu_properties, require_device


class DecodeHead(nn.Linear):
    """What a plain linear layer with many outputs becomes: up to 16 rows without gradients, in fp16 or bf16 on a GPU,
    run on our op; all else, and everything but :meth:`forward`, is ``nn.Linear``'s.

    The product is rounded once from float32, as cuBLAS's is, which adds in another order. A row's logits do not depend
    on the batch that it is in. Both write where :func:`~hf_fastpath.modules.logits_target.logits_go_to` says.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``(..., in_features)`` to ``(..., out_features)``."""
        if not _plain(input, self.weight, self.bias):
            return super().forward(input)
        rows, ours = input.reshape(-1, self.in_features), self._supports(input)
        target = logits_target(rows.shape[0], self.out_features, input)
        if ours:
            require_device(input.device)
            rows = _aligned(rows)
        if target is None:
            if not ours:
                return super().forward(input)
            target = linear_16bit(rows, self.weight, self.bias, None, 0.0, None)
        elif ours:
            linear_16bit_into(rows, self.weight, self.bias, target)
        elif self.bias is None:
            torch.mm(rows, self.weight.T, out=target)
        else:
            torch.addmm(self.bias, rows, self.weight.T, out=target)
        return target.view(*input.shape[:-1], self.out_features)

    def _supports(self, input: torch.Tensor) -> bool:
        return self._supports_rows(input.shape[:-1].numel(), input)

    def _supports_rows(self, rows: int, like: torch.Tensor) -> bool:
        kind, capability = like.device.type, (0, 0)
        if kind == "cuda":
            gpu = gpu_properties(like.device)
            capability = gpu.major, gpu.minor
        return heuristics.linear_16bit_supports(kind, like.dtype, rows, self.in_features, capability)

    def keeps_row_bits(self, rows: int) -> bool:
        """Whether up to ``rows`` rows run on our op: see :func:`hf_fastpath.spare_rows.keeps_row_bits`."""
        return _takes(self.weight, self.weight, self.bias) and self._supports_rows(rows, self.weight)


class DecodeNorm(nn.Module):
    """The forward pass of a mixin; the other base class is an RMSNorm of transformers', which does all but one new
    token a row without gradients, in fp16 or bf16 on a GPU."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> Any:
        """``(batch, T, hidden_size)`` to the same."""
        x, size = hidden_states, hidden_states.shape[-1]
        step = x.dim() == 3 and x.shape[1] == 1 and x.shape[0] > 0
        supported = heuristics.rms_norm_supports(x.device.type, x.dtype, size)
        if not step or not supported or not _plain(x, self.weight):
            return super().forward(hidden_states)
        require_device(x.device)
        return rms_norm(_aligned(x.reshape(-1, size)), self.weight, self.variance_epsilon).view(x.shape)

    def keeps_row_bits(self, rows: int) -> bool:
        """Whether new tokens run on our op: see :func:`hf_fastpath.spare_rows.keeps_row_bits`."""
        w = self.weight
        return _takes(w, w) and heuristics.rms_norm_supports(w.device.type, w.dtype, w.numel())


def _plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    """Whether an op may take x and a module's tensors: nobody wants gradients, and they are what they seem. A compiler
    cannot look at addresses, and gets what it knows."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
        return False
    return _takes(x, weight, bias)


def _takes(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    """The same of the tensors alone, of x its dtype and device."""
    if weight.data_ptr() % 16:
        return False
    return all(
        type(tensor) in (nn.Parameter, torch.Tensor)  # no subclass, which may be quantized
        and tensor.dtype is x.dtype
        and tensor.device == x.device
        and tensor.is_contiguous()
        for tensor in (weight, bias)
        if tensor is not None
    )


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x ``(M, K)``, or a copy of it whose rows are aligned to 16 bytes."""
    fits = x.stride(1) == 1 and x.data_ptr() % 16 == 0 and (x.shape[0] == 1 or x.stride(0) % 8 == 0)
    return x if fits else x.clone(memory_format=torch.contiguous_format)
