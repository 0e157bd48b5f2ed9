"""Attention of prompts, in tiles and of short ones, on torch's CUDA kernels, against float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_fastpath.caches import chunks
from hf_fastpath.caches.attention import attend_short_prompt
from hf_fastpath.caches.chunks import attend_in_tiles
from hf_fastpath.caches.int8 import Int8KVLayer
from hf_fastpath.caches.static import StaticKVLayer

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(32, 8, 128), (8, 2, 64), (3, 3, 80), (4, 1, 256), (6, 2, 16), (4, 2, 40)]
)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 2), (3, 77), (1, 512), (2, 1024)])
def test_short_prompts_against_float64(
    batch: int, tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(tokens + dim)
    query = torch.randn(batch, tokens, heads, dim, device="cuda").to(dtype).transpose(1, 2)  # as a layer hands it on
    keys, values = torch.randn(2, batch, kv_heads, tokens, dim, device="cuda").to(dtype)
    got = attend_short_prompt(Int8KVLayer(), query, keys, values, None, 0.1, {"position_ids": None})
    assert got is not None
    assert got.is_contiguous()
    k, v = (x.double().repeat_interleave(heads // kv_heads, 1) for x in (keys, values))
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device="cuda").tril()
    want = ((query.double() @ k.transpose(2, 3) * 0.1).masked_fill(~causal, float("-inf")).softmax(-1) @ v).transpose(
        1, 2
    )
    # The weights are rounded to the dtype before they are multiplied with values, and so is the sum.
    assert float((got.double() - want).abs().max() / want.abs().max()) < 2 * torch.finfo(dtype).eps


def test_what_is_no_short_prompt_is_left_to_sdpa() -> None:
    layer = Int8KVLayer()
    q, k = torch.zeros(1, 4, 8, 64, device="cuda").half(), torch.zeros(1, 2, 8, 64, device="cuda").half()
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool, device="cuda")
    assert attend_short_prompt(layer, q, k, k, None, 0.1, {}) is not None
    assert attend_short_prompt(layer, q, k, k, mask, 0.1, {}) is None
    assert attend_short_prompt(StaticKVLayer(), q, k, k, None, 0.1, {}) is None
    assert attend_short_prompt(layer, q[:, :, 3:], k, k, None, 0.1, {}) is None
    assert attend_short_prompt(layer, q.float(), k.float(), k.float(), None, 0.1, {}) is None
    assert attend_short_prompt(layer, q, k, k, None, 0.1, {"softcap": 30.0}) is None
    long = torch.zeros(1, 2, 1025, 64, device="cuda").half()
    assert attend_short_prompt(layer, long, long, long, None, 0.1, {}) is None
    with sdpa_kernel(SDPBackend.MATH):
        assert attend_short_prompt(layer, q, k, k, None, 0.1, {}) is None
