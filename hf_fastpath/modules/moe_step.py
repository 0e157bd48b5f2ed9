"""A mixture of experts behind its norm, for one new token a row, in three kernels:

norm and router | gate, up and SwiGLU of the chosen experts | down, shares and residual.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from hf_fastpath.modules.decoder_step import Norm
from hf_fastpath.modules.experts16 import Experts16
from hf_fastpath.modules.moe_router import MoERouter
from hf_fastpath.modules.packed_experts import PackedExperts


class MoEParts(NamedTuple):
    """What a layer's mixture of experts consists of, the norm before it included."""

    router: MoERouter
    expert_bias: torch.Tensor | None
    experts: PackedExperts | Experts16
    norm: Norm


class MoEStep:
    """The residual stream behind a mixture of experts. It takes any number of rows; up to
    ``heuristics.MOE_FEW_ROWS`` are as many kernels as the module's first line says.

    Its roundings are those of transformers' modules, but that the experts' sum and the residual are rounded together,
    once.
    """

    def __init__(self, parts: MoEParts) -> None:
        self.parts = parts

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x ``(M, hidden_size)``, contiguous, to the same."""
        p = self.parts
        normalized, shares, chosen = p.router.behind_norm(x, p.norm.weight, p.norm.eps, p.expert_bias)
        y: torch.Tensor = p.experts(normalized, chosen, shares, x)
        return y

    def keeps_row_bits(self, rows: int) -> bool:
        """Whether up to ``rows`` rows run on our ops: see :func:`hf_fastpath.spare_rows.keeps_row_bits`."""
        norm, router, experts = self.parts.norm.weight, self.parts.router, self.parts.experts
        return norm.dtype == router.weight.dtype and router.keeps_row_bits(rows) and experts.keeps_row_bits(rows)
