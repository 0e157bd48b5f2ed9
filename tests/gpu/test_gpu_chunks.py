"""Attention of a prompt chunk in tiles, on torch's CUDA kernels, against float64."""

from __future__ import annotations

import pytest
import torch

from hf_fastpath.caches import chunks
from hf_fastpath.caches.chunks import attend_in_tiles

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 8, 128), (8, 2, 64), (3, 3, 80), (4, 1, 256), (4, 2, 36)])
@pytest.mark.parametrize(("tokens", "length"), [(1, 1), (5, 5), (300, 300), (7, 60), (333, 1000), (129, 5001)])
@pytest.mark.parametrize("padding", [None, 0, 77])
def test_against_float64(
    tokens: int, length: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, padding: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(chunks, "TILE_BYTES", 0)
    torch.manual_seed(tokens + length)
    query = torch.randn(2, heads, tokens, dim, device="cuda").to(dtype)
    keys, values = torch.randn(2, 2, kv_heads, length, dim, device="cuda").to(dtype)
    causal = torch.ones(tokens, length, dtype=torch.bool, device="cuda").tril(length - tokens)
    visible = causal.expand(2, 1, -1, -1).clone()
    if padding:
        visible[1, :, :, : min(padding, length)] = False
    mask = None if padding is None else visible
    got = attend_in_tiles(query, kv_heads, length, lambda a, b: (keys[:, :, a:b], values[:, :, a:b]), mask, 0.1)
    k, v = (x.double().repeat_interleave(heads // kv_heads, 1) for x in (keys, values))
    scores = (query.double() @ k.transpose(2, 3) * 0.1).masked_fill(~visible, float("-inf"))
    want = scores.softmax(-1).nan_to_num(0) @ v
    # torch's kernels round the weights to the dtype before they multiply with values (eps / 2 of each, so of the whole
    # at most), each tile's result to it, and the sum once more: 3 * eps / 2, and as much again for what is summed.
    error = float((got.double() - want).abs().max() / want.abs().max().clamp(min=1e-30))
    assert error < max(3 * torch.finfo(dtype).eps, 1e-5)
