"""Append and dequantize of the int8 cache: the CUDA kernels in the emulator, against the references' bits."""

from __future__ import annotations

import pytest
import torch
from emulated_ops import EmulatedOps
from emulator import needs_emulator
from kernel_cases import DTYPES, generator

from hf_fastpath.ops.kv_int8_append import kv_int8_append_reference
from hf_fastpath.ops.kv_int8_dequantize import kv_int8_dequantize_reference

pytestmark = needs_emulator

SENTINEL = 42


def make_cache(batch: int, heads: int, capacity: int, dim: int) -> list[torch.Tensor]:
    shapes = [(batch, heads, capacity, dim), (batch, heads, capacity)] * 2
    dtypes = [torch.int8, torch.float16] * 2
    return [torch.full(shape, SENTINEL, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]


def check_append(key: torch.Tensor, value: torch.Tensor, capacity: int, start: int) -> None:
    """The same bits, NaN for NaN, and the sentinel where no token belongs."""
    batch, heads, _, dim = key.shape
    cache, expected = make_cache(batch, heads, capacity, dim), make_cache(batch, heads, capacity, dim)
    for append, into in ((EmulatedOps().kv_int8_append, cache), (kv_int8_append_reference, expected)):
        k_data, k_scale, v_data, v_scale = into
        append(key, value, k_data, k_scale, v_data, v_scale, start)
    for got, want in zip(cache, expected, strict=True):
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got[~want.isnan()], want[~want.isnan()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 7, 48, 64, 72, 80, 128, 256])
@pytest.mark.parametrize(("batch", "heads", "tokens", "start"), [(1, 1, 1, 0), (2, 3, 5, 4), (1, 2, 17, 7)])
def test_append_has_the_references_bits(
    batch: int, heads: int, tokens: int, start: int, dim: int, dtype: torch.dtype
) -> None:
    rng = generator(batch, heads, tokens, dim)
    # As a model has them: (B, q, H, D) transposed. Values of one token differ in size from another's.
    key, value = (
        (
            torch.randn(batch, tokens, heads, dim, generator=rng)
            * torch.randn(batch, tokens, heads, 1, generator=rng).exp()
        )
        .to(dtype)
        .transpose(1, 2)
        for _ in range(2)
    )
    check_append(key, value, start + tokens + 3, start)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_append_of_slices_of_one_projection(dtype: torch.dtype) -> None:
    """Keys and values as slices of a fused projection's rows, at an odd offset: the path without vector loads."""
    projection = torch.randn(2, 4, 1 + 2 * 192, generator=generator(3)).to(dtype)
    key = projection[..., 1 : 1 + 192].view(2, 4, 3, 64).transpose(1, 2)
    value = projection[..., 193 : 193 + 192].view(2, 4, 3, 64).transpose(1, 2)
    check_append(key, value, 8, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_append_of_special_values(dtype: torch.dtype) -> None:
    """Ties, zeros, scales that round to 0 or are subnormal or overflow, infinity and NaN."""
    key = torch.zeros(1, 1, 9, 64, dtype=dtype)
    key[0, 0, 1] = torch.arange(64) * 2.0 + 1  # largest 127: the scale is 1
    key[0, 0, 2] = (torch.arange(64) - 32) * 0.5  # ties, once the scale is set to 1 by the largest
    key[0, 0, 2, 0] = 127.0
    key[0, 0, 3] = 1e-7
    key[0, 0, 4] = torch.linspace(-1e-5, 1e-5, 64)
    key[0, 0, 5] = 60000.0
    key[0, 0, 6, 10] = float("inf")
    key[0, 0, 7, 20] = float("nan")
    key[0, 0, 8] = 3e38 if dtype == torch.bfloat16 else 65504.0
    check_append(key, -key, 9, 0)


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
    expected = torch.empty(batch, heads, length, dim, dtype=dtype)
    kv_int8_dequantize_reference(data, scale, expected)
    for shift in (1, 8):  # without and with vector stores, a sentinel around
        buffer = torch.full((expected.numel() + 2 * shift,), float(SENTINEL), dtype=dtype)
        out = buffer[shift:-shift].view(expected.shape)
        EmulatedOps().kv_int8_dequantize(data, scale, out)
        assert torch.equal(out, expected)
        assert (buffer[:shift] == SENTINEL).all()
        assert (buffer[-shift:] == SENTINEL).all()
