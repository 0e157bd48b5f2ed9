"""The embeddings of a decode step's tokens, in a kernel that the next one need not wait for to begin."""

from __future__ import annotations

import torch
from torch import nn

from hf_fastpath import heuristics
from hf_fastpath.ops.embedding_rows import embedding_rows
from hf_fastpath.runtime import require_device


class DecodeEmbedding(nn.Embedding):
    """What a model's embedding becomes: up to 16 tokens without gradients, in fp16 or bf16 on a GPU, are looked up by
    our op; all else, and everything but :meth:`forward`, is ``nn.Embedding``'s."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """int64 ``(...)`` to ``(..., embedding_dim)``."""
        if not self._takes(input):
            return super().forward(input)
        require_device(input.device)
        rows = embedding_rows(input.reshape(-1).contiguous(), self.weight)
        return rows.view(*input.shape, self.embedding_dim)

    def _takes(self, input: torch.Tensor) -> bool:
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return False
        weight = self.weight
        return (
            heuristics.embedding_rows_supports(input.device.type, weight.dtype, input.numel(), self.embedding_dim)
            and input.dtype is torch.int64
            and input.device == weight.device
            and type(weight) is nn.Parameter  # no subclass, which may be quantized
            and weight.is_contiguous()
            and weight.data_ptr() % 16 == 0
            and self.max_norm is None
        )
