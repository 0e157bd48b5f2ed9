"""Attention of a prompt chunk in tiles against float64 over all tokens at once."""

from __future__ import annotations

import pytest
import torch

from hf_fastpath.caches import chunks
from hf_fastpath.caches.chunks import attend_in_tiles


def exact(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scaling: float):
    groups = query.shape[1] // keys.shape[1]
    k, v = (x.double().repeat_interleave(groups, 1) for x in (keys, values))
    scores = (query.double() @ k.transpose(2, 3) * scaling).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).nan_to_num(0) @ v


def causal(batch: int, tokens: int, length: int) -> torch.Tensor:
    return torch.ones(tokens, length, dtype=torch.bool).tril(length - tokens).expand(batch, 1, -1, -1).clone()


@pytest.fixture(params=[16, 1024], ids=lambda tokens: f"tile{tokens}")
def tile_tokens(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(chunks, "TILE_BYTES", 0)
    monkeypatch.setattr(chunks, "LEAST_TILE_TOKENS", request.param)
    return int(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(8, 2, 64), (3, 3, 80), (4, 1, 40)])
@pytest.mark.parametrize(("tokens", "length"), [(1, 1), (5, 5), (40, 40), (7, 60), (50, 97), (1, 33)])
def test_against_float64(
    tile_tokens: int, tokens: int, length: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(tokens + length)
    query = torch.randn(2, heads, tokens, dim).to(dtype)
    keys, values = torch.randn(2, 2, kv_heads, length, dim).to(dtype)
    padded = causal(2, tokens, length)
    padded[1, :, :, : length // 2] = False  # leading padding, whose queries see nothing where the chunk begins in it
    seen: list[int] = []

    def expand(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert start == (seen[-1] if seen else 0)
        assert 0 < stop - start <= tile_tokens
        seen.append(stop)
        return keys[:, :, start:stop], values[:, :, start:stop]

    for mask in (None, causal(2, tokens, length), padded):
        seen.clear()
        got = attend_in_tiles(query, kv_heads, length, expand, mask, dim**-0.5)
        assert seen[-1] == length
        assert got.dtype == dtype
        want = exact(query, keys, values, causal(2, tokens, length) if mask is None else mask, dim**-0.5)
        # torch's kernels round the weights to the dtype before they multiply with values (eps / 2 of each, so of the
        # whole at most), each tile's result, and the sum once more: 3 * eps / 2, and as much again for what is summed.
        error = float((got.double() - want).abs().max() / want.abs().max().clamp(min=1e-30))
        assert error < max(3 * torch.finfo(dtype).eps, 2e-6)


def test_a_query_that_sees_nothing_gives_0(tile_tokens: int) -> None:
    query, (keys, values) = torch.randn(1, 2, 3, 16), torch.randn(2, 1, 1, 40, 16)
    mask = causal(1, 3, 40)
    mask[0, 0, 1] = False
    got = attend_in_tiles(query, 1, 40, lambda a, b: (keys[:, :, a:b], values[:, :, a:b]), mask, 0.25)
    assert not bool(got[:, :, 1].any())
    assert bool(got[:, :, 0].all())
    assert not bool(got.isnan().any())


def test_the_mask_is_looked_at_once(tile_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    query, (keys, values) = torch.randn(1, 2, 3, 16), torch.randn(2, 1, 1, 40, 16)
    looked: list[int] = []
    real = torch.stack
    monkeypatch.setattr(torch, "stack", lambda parts, *rest: looked.append(len(parts)) or real(parts, *rest))

    def attend(mask: torch.Tensor) -> torch.Tensor:
        return attend_in_tiles(query, 1, 40, lambda a, b: (keys[:, :, a:b], values[:, :, a:b]), mask, 0.25)

    first, second = causal(1, 3, 40), causal(1, 3, 40)
    second[..., :20] = False
    assert torch.equal(attend(first), attend(first))
    assert len(looked) == 1
    assert not torch.equal(attend(first), attend(second))
    assert len(looked) == 2
