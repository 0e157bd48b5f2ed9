"""Expanding the int8 cache on the GPU: the reference's bits, and nothing written beside them."""

from __future__ import annotations

import pytest
import torch
from gpu_common import DEVICE
from kernel_cases import DTYPES, generator

from hf_fastpath.ops import kv_int8_dequantize

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [7, 48, 64, 80, 128, 256])
@pytest.mark.parametrize(("batch", "heads", "capacity", "length"), [(1, 1, 1, 1), (2, 3, 9, 5), (1, 8, 300, 257)])
def test_dequantize_has_the_references_bits(
    batch: int, heads: int, capacity: int, length: int, dim: int, dtype: torch.dtype
) -> None:
    rng = generator(batch, heads, capacity, dim)
    data = torch.randint(-127, 128, (batch, heads, capacity, dim), generator=rng, dtype=torch.int8)
    scale = (torch.rand(batch, heads, capacity, generator=rng) * 3).half()
    scale[:, :, length:] = float("nan")
    whole = torch.empty(batch, heads, length, dim, dtype=dtype)
    whole.copy_(data[:, :, :length].float() * scale[:, :, :length].float().unsqueeze(-1))
    got = kv_int8_dequantize(data.to(DEVICE), scale.to(DEVICE), slice(0, length), dtype)
    assert torch.equal(got.cpu(), whole)
    start = length // 3
    expected = whole[:, :, start:].contiguous()
    for shift in (1, 8):  # without and with vector stores, a sentinel around
        buffer = torch.full((expected.numel() + 2 * shift,), 42.0, dtype=dtype, device=DEVICE)
        out = buffer[shift:-shift].view(expected.shape)
        torch.ops.hf_fastpath.kv_int8_dequantize(data.to(DEVICE), scale.to(DEVICE), start, out)
        assert torch.equal(out.cpu(), expected)
        assert (buffer[:shift] == 42).all()
        assert (buffer[-shift:] == 42).all()


def test_more_tokens_than_there_is_room_for_are_refused() -> None:
    data, scale = torch.zeros(1, 2, 8, 64, dtype=torch.int8), torch.zeros(1, 2, 8, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="tokens 4 to 9 are not within the capacity 8"):
        kv_int8_dequantize(data.to(DEVICE), scale.to(DEVICE), slice(4, 9), torch.float16)
