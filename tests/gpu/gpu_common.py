"""tests/kernel_cases.py on the GPU."""

from __future__ import annotations

from functools import partial

import kernel_cases
import torch
from kernel_cases import Target

from hf_fastpath import ops

DEVICE = "cuda"
GPU = Target(DEVICE, ops)

make_weight = partial(kernel_cases.make_weight, GPU)
poison = partial(kernel_cases.poison, device=DEVICE)


def randn(rng: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=rng).to(dtype).to(DEVICE)
