"""The rotation of keys and queries before keys are quantized: an orthonormal Hadamard transform of each head.

Keys have a few channels much larger than the rest, and one scale a token must cover them. The transform spreads every
channel over all of them, and since query and key are rotated alike their product is what it was (Ashkboos et al.,
2024, "QuaRot", section 4).
"""

from __future__ import annotations

import functools

import torch


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)  # made once, and usable wherever the first caller happened to be
def rotation_matrix(dim: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    """The symmetric orthonormal ``(dim, dim)`` matrix: Sylvester-Hadamard blocks of the largest power of two that
    divides ``dim``, divided by the square root of their size."""
    block = dim & -dim
    hadamard = torch.ones(1, 1)
    while hadamard.shape[0] < block:
        top, bottom = torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)
        hadamard = torch.cat([top, bottom])
    blocks = torch.block_diag(*[hadamard * block**-0.5] * (dim // block))
    return blocks.to(device=device, dtype=dtype)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """x ``(..., dim)`` rotated, in its own dtype; applied twice it gives x back, up to rounding."""
    return x @ rotation_matrix(x.shape[-1], x.dtype, str(x.device))
