"""Append and dequantize of the int8 cache on the GPU: the references' bits, and nothing written beside them."""

from __future__ import annotations

import pytest
import torch
from gpu_common import DEVICE, randn
from kernel_cases import DTYPES, generator

from hf_fastpath.ops import kv_int8_append, kv_int8_dequantize
from hf_fastpath.ops.kv_int8_append import kv_int8_append_reference

pytestmark = pytest.mark.gpu

SENTINEL = 42


def append_on_cpu(key: torch.Tensor, value: torch.Tensor, cache: list[torch.Tensor], start: int) -> None:
    k_data, k_scale, v_data, v_scale = cache
    kv_int8_append_reference(key, value, k_data, k_scale, v_data, v_scale, start)


class Cache:
    """Keys and values of (B, H, capacity, D) inside larger buffers, everything set to a sentinel."""

    def __init__(self, batch: int, heads: int, capacity: int, dim: int, *, shift: int = 16) -> None:
        count = batch * heads * capacity
        self.buffers = []
        for size, dtype in ((count * dim, torch.int8), (count, torch.float16)) * 2:
            self.buffers.append(torch.full((size + 2 * shift,), SENTINEL, dtype=dtype, device=DEVICE))
        shapes = [(batch, heads, capacity, dim), (batch, heads, capacity)] * 2
        views = [b[shift : b.numel() - shift].view(s) for b, s in zip(self.buffers, shapes, strict=True)]
        self.k_data, self.k_scale, self.v_data, self.v_scale = self.views = views

    def append(self, key: torch.Tensor, value: torch.Tensor, start: int) -> None:
        kv_int8_append(key, value, self.k_data, self.k_scale, self.v_data, self.v_scale, start)

    def cpu_copy(self) -> list[torch.Tensor]:
        return [view.cpu().clone() for view in self.views]

    def check(self, expected: list[torch.Tensor], shift: int = 16) -> None:
        for view, want in zip(self.views, expected, strict=True):
            assert torch.equal(view.cpu(), want)
        for buffer in self.buffers:
            assert (buffer[:shift] == SENTINEL).all()
            assert (buffer[-shift:] == SENTINEL).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 7, 48, 64, 72, 80, 96, 128, 256])
@pytest.mark.parametrize(
    ("batch", "heads", "tokens", "start"), [(1, 1, 1, 0), (2, 3, 5, 4), (1, 8, 65, 7), (8, 2, 1, 9)]
)
def test_append_has_the_references_bits(
    batch: int, heads: int, tokens: int, start: int, dim: int, dtype: torch.dtype
) -> None:
    rng = generator(batch, heads, tokens, dim)
    cache = Cache(batch, heads, start + tokens + 3, dim)
    expected = cache.cpu_copy()
    # As a model has them: (B, q, H, D) transposed. Values of one token differ in size from another's.
    key, value = (
        (randn(rng, batch, tokens, heads, dim) * randn(rng, batch, tokens, heads, 1).exp()).to(dtype).transpose(1, 2)
        for _ in range(2)
    )
    cache.append(key, value, start)
    append_on_cpu(key.cpu(), value.cpu(), expected, start)
    cache.check(expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_append_of_slices_of_one_projection(dtype: torch.dtype) -> None:
    """Keys and values as slices of a fused projection's rows, at an odd offset: the path without vector loads."""
    rng = generator(3)
    projection = randn(rng, 2, 4, 1 + 3 * 64 * 3, dtype=dtype)
    key = projection[..., 1 : 1 + 192].view(2, 4, 3, 64).transpose(1, 2)
    value = projection[..., 193 : 193 + 192].view(2, 4, 3, 64).transpose(1, 2)
    cache = Cache(2, 3, 8, 64)
    expected = cache.cpu_copy()
    cache.append(key, value, 2)
    append_on_cpu(key.cpu(), value.cpu(), expected, 2)
    cache.check(expected)


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
    cache = Cache(1, 1, 9, 64)
    expected = cache.cpu_copy()
    cache.append(key.to(DEVICE), -key.to(DEVICE), 0)
    append_on_cpu(key, -key, expected, 0)
    for view, want in zip(cache.views, expected, strict=True):
        finite = ~want.isnan()
        assert torch.equal(view.cpu()[finite], want[finite])
        assert view.cpu()[~finite].isnan().all()


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
    expected = torch.empty(batch, heads, length, dim, dtype=dtype)
    expected.copy_(data[:, :, :length].float() * scale[:, :, :length].float().unsqueeze(-1))
    assert torch.equal(kv_int8_dequantize(data.to(DEVICE), scale.to(DEVICE), length, dtype).cpu(), expected)
    for shift in (1, 8):  # without and with vector stores, a sentinel around
        buffer = torch.full((expected.numel() + 2 * shift,), 42.0, dtype=dtype, device=DEVICE)
        out = buffer[shift:-shift].view(expected.shape)
        torch.ops.hf_fastpath.kv_int8_dequantize(data.to(DEVICE), scale.to(DEVICE), out)
        assert torch.equal(out.cpu(), expected)
        assert (buffer[:shift] == 42).all()
        assert (buffer[-shift:] == 42).all()


def test_the_comparison_sees_one_wrong_step() -> None:
    cache = Cache(1, 2, 4, 64)
    expected = cache.cpu_copy()
    key = randn(generator(4), 1, 2, 3, 64, dtype=torch.bfloat16)
    cache.append(key, key, 1)
    append_on_cpu(key.cpu(), key.cpu(), expected, 1)
    cache.v_data[0, 1, 2, 63] += 1
    with pytest.raises(AssertionError):
        cache.check(expected)


def test_bad_arguments_are_refused_in_words() -> None:
    cache = Cache(1, 2, 8, 64)
    new = randn(generator(5), 1, 2, 3, 64, dtype=torch.float16)
    k_data, k_scale, v_data, v_scale = cache.views
    cases: list[tuple[str, tuple[object, ...]]] = [
        ("key must be float16 or bfloat16", (new.float(), new.float(), *cache.views, 0)),
        ("same dtype", (new, new.bfloat16(), *cache.views, 0)),
        ("do not fit a capacity of 8", (new, new, *cache.views, 6)),
        ("do not fit a capacity of 8", (new, new, *cache.views, -1)),
        ("k_data must be int8", (new, new, k_data.float(), k_scale, v_data, v_scale, 0)),
        ("k_scale must have shape", (new, new, k_data, k_scale[:, :, :4], v_data, v_scale, 0)),
        ("v_data must be contiguous", (new, new, k_data, k_scale, v_data.transpose(2, 3).contiguous().mT, v_scale, 0)),
        ("value must have shape", (new, new[:, :, :2], *cache.views, 0)),
        ("v_scale must be on cuda:0", (new, new, k_data, k_scale, v_data, v_scale.cpu(), 0)),
    ]
    for message, args in cases:
        with pytest.raises(RuntimeError, match=message):
            kv_int8_append(*args)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="length 9 is more than the capacity 8"):
        kv_int8_dequantize(k_data, k_scale, 9, torch.float16)


def test_appending_nothing_writes_nothing() -> None:
    cache = Cache(1, 2, 8, 64)
    empty = torch.empty(1, 2, 0, 64, dtype=torch.float16, device=DEVICE)
    expected = cache.cpu_copy()
    cache.append(empty, empty, 8)
    cache.check(expected)
