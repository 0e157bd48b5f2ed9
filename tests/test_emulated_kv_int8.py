"""Expanding the int8 cache: the CUDA kernel in the emulator, against the reference's bits."""

from __future__ import annotations

import pytest
import torch
from emulated import EmulatedOps
from emulator import needs_emulator
from kernel_cases import DTYPES, generator

from hf_fastpath.ops.kv_int8_dequantize import kv_int8_dequantize_reference

pytestmark = needs_emulator

SENTINEL = 42


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [7, 48, 64, 80, 256])
@pytest.mark.parametrize(("batch", "heads", "capacity", "length"), [(1, 1, 1, 1), (2, 3, 9, 5), (1, 2, 40, 33)])
def test_dequantize_has_the_references_bits(
    batch: int, heads: int, capacity: int, length: int, dim: int, dtype: torch.dtype
) -> None:
    rng = generator(batch, heads, capacity, dim)
    data = torch.randint(-127, 128, (batch, heads, capacity, dim), generator=rng, dtype=torch.int8)
    scale = (torch.rand(batch, heads, capacity, generator=rng) * 3).half()
    scale[:, :, length:] = float("nan")
    start = length // 3
    expected = torch.empty(batch, heads, length - start, dim, dtype=dtype)
    kv_int8_dequantize_reference(data, scale, start, expected)
    for shift in (1, 8):  # without and with vector stores, a sentinel around
        buffer = torch.full((expected.numel() + 2 * shift,), float(SENTINEL), dtype=dtype)
        out = buffer[shift:-shift].view(expected.shape)
        EmulatedOps().kv_int8_dequantize(data, scale, start, out)
        assert torch.equal(out, expected)
        assert (buffer[:shift] == SENTINEL).all()
        assert (buffer[-shift:] == SENTINEL).all()
