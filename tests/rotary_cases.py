"""Inputs and bounds of rotary angles, on a GPU (tests/gpu) and in the emulator alike."""

from __future__ import annotations

from typing import Any

import torch
from kernel_cases import ROUNDING, SMALLEST, assert_within
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Rows, tokens and half of the rotary dimensions: less than a warp, whole warps, more than a CTA has threads.
SHAPES = [(1, 1, 1), (1, 1, 64), (3, 1, 32), (2, 5, 48), (1, 7, 128), (2, 3, 133)]
FARTHEST = 1_000_000  # beyond what cosf reduces in the simple way

# Ways to make the frequencies, all of them fixed.
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
}


def frequencies(half: int, base: float = 1e4) -> torch.Tensor:
    """float32 ``(half,)``, as transformers makes them."""
    return 1.0 / (base ** (torch.arange(0, 2 * half, 2, dtype=torch.float) / (2 * half)))


def positions_of(rng: torch.Generator, rows: int, tokens: int) -> torch.Tensor:
    """Random ones, and among them the first two and the farthest."""
    positions = torch.randint(0, 131_073, (rows * tokens,), generator=rng)
    special = torch.tensor([FARTHEST, 1, 0])[: rows * tokens]
    positions[: len(special)] = special
    return positions.view(rows, tokens)


def rotary_embedding(rope_type: str = "default", **parameters: Any) -> LlamaRotaryEmbedding:
    rope = {"rope_type": rope_type, "rope_theta": 1e4, **parameters}
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=256, rope_parameters=rope)
    return LlamaRotaryEmbedding(config=config)


def check_angles(
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    scaling: float,
    found: tuple[torch.Tensor, torch.Tensor],
    dtype: torch.dtype,
) -> None:
    """Against float64, but for the angle, which is rounded to float32 in any implementation: cosf and sinf are off by 2
    units in the last place at most (CUDA C++ Programming Guide, "Mathematical Functions"), 2^-23 in all; then the
    product with the factor and the result are rounded."""
    angles = (positions[..., None].float() * inv_freq).double()
    factor = float(torch.tensor(scaling, dtype=torch.float32))
    for out, function in zip(found, (torch.cos, torch.sin), strict=True):
        assert out.dtype is dtype
        assert out.shape == (*positions.shape, 2 * inv_freq.shape[0])
        exact = function(torch.cat([angles, angles], dim=-1)) * factor
        rounding = ROUNDING.get(dtype, 0.0) * 1.01 + 2.0**-24
        assert_within(out, exact, 2.0**-23 * factor + rounding * exact.abs() + SMALLEST)
