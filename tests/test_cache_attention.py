"""Decode attention of every compressed format against float64, and the rounding that each format promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cache_formats import CACHES, E4M3, nearest
from tiny_models import make_llama

from hf_fastpath import Int4KIVICache, StaticKVCache, Unsupported
from hf_fastpath.caches import CompressedLayer
from hf_fastpath.ops import _attention
from hf_fastpath.ops.kv_fp8_append import quantize_fp8_groups
from hf_fastpath.ops.kv_int4_append import quantize_int4, value_groups

COMPRESSED = [kind.layer_class for kind in CACHES if kind is not StaticKVCache]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def filled(kind: type[CompressedLayer], kv_heads: int, tokens: int, dim: int, dtype: torch.dtype) -> CompressedLayer:
    """A layer of a batch of 2 that got its tokens in three steps, the last a single one."""
    layer = kind()
    for part in torch.randn(2, 2, kv_heads, tokens, dim).to(dtype).split([tokens // 2, tokens - tokens // 2 - 1, 1], 3):
        if part.shape[3]:
            layer.update(*part)
    return layer


def exact_attention(query: torch.Tensor, layer: Any, mask: torch.Tensor | None, scaling: float) -> torch.Tensor:
    """In float64, over what the layer says that it holds."""
    groups = query.shape[1] // layer.storage[0].shape[1]
    k, v = (layer.expand(which, layer.length, torch.float32).double() for which in ("keys", "values"))
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (query.double().unsqueeze(2) @ k.transpose(2, 3)).squeeze(2) * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, : layer.length], float("-inf"))
    return (scores.softmax(-1).nan_to_num(0).unsqueeze(2) @ v).squeeze(2)


@pytest.mark.parametrize("kind", COMPRESSED, ids=lambda kind: kind.format)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 48), (9, 3, 64), (8, 1, 80), (7, 1, 40)])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200, 1100])
def test_decode_attention(
    kind: type[CompressedLayer], heads: int, kv_heads: int, dim: int, length: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(length + dim)
    query = torch.randn(2, heads, dim).to(dtype)
    layer = filled(kind, kv_heads, length, dim, dtype)
    mask = torch.rand(2, length + 3) > 0.3
    mask[:, 0] = True
    for chosen in (None, mask):
        got = layer.decode(query, chosen, dim**-0.5).double()
        exact = exact_attention(query, layer, chosen, dim**-0.5)
        # Computed in float32 and rounded once to the query's dtype. Before that the query is rotated in its dtype,
        # which moves scores by eps times about 1, so each weight by as much relative to itself; three times eps in all.
        assert float((got - exact).norm() / exact.norm()) < max(3 * torch.finfo(dtype).eps, 2e-5)


@pytest.mark.parametrize("kind", COMPRESSED, ids=lambda kind: kind.format)
def test_masked_rows_nan_and_tiles(kind: type[CompressedLayer], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, query = filled(kind, 2, 150, 32, torch.float32), torch.randn(2, 4, 32)
    mask = torch.ones(2, 150, dtype=torch.bool)
    whole = layer.decode(query, mask, 0.2)
    monkeypatch.setattr(_attention, "TILE_TOKENS", 64)
    torch.testing.assert_close(layer.decode(query, mask, 0.2), whole, rtol=1e-5, atol=1e-6)
    mask[1] = False
    got = layer.decode(query, mask, 0.2)
    torch.testing.assert_close(got[0], whole[0], rtol=1e-5, atol=1e-6)
    assert not bool(got[1].any())
    query[0, 2, 0] = float("nan")
    for chosen in (None, mask):
        got = layer.decode(query, chosen, 0.2)
        assert bool(got[0, 2].isnan().all())
        assert int(got.isnan().sum()) == 32


@pytest.mark.parametrize("kind", COMPRESSED, ids=lambda kind: kind.format)
def test_decoding_expands_no_more_than_a_tile(kind: type[CompressedLayer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_attention, "TILE_TOKENS", 64)
    layer, query = filled(kind, 1, 1024, 32, torch.float32), torch.randn(2, 2, 32)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype in DTYPES:
                largest = max(largest, out.numel())
            return out

    with Watch():
        layer.decode(query, None, 0.2)
    assert largest <= 2 * 128 * 32  # a tile, or the latest tokens in full precision


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_groups(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x = (torch.randn(2, 3, 5 * 64, 48) * torch.logspace(-3, 3, 5).repeat_interleave(64)[:, None]).to(dtype)
    x[0, 0, :64] = 0
    x[0, 1, 64] = 448 * 0.25  # exactly representable, and the largest of its group
    q, scale = quantize_fp8_groups(x)
    assert q.dtype == torch.float8_e4m3fn
    assert scale.shape == (2, 3, 5)
    groups = x.double().unflatten(2, (5, 64))
    largest = groups.abs().amax((3, 4))
    used = largest / scale.double()
    assert bool(((used > 224) & (used <= 448) | (largest == 0)).all())  # the smallest power of two that fits
    assert bool((torch.frexp(scale)[0] == 0.5).all())
    back = q.double().unflatten(2, (5, 64)) * scale.double()[..., None, None]
    assert torch.equal(back, nearest(groups / scale.double()[..., None, None], E4M3) * scale.double()[..., None, None])
    # What was rounded once stays as it is, whatever else the group holds that is not thousands of times larger.
    again, scale_again = quantize_fp8_groups(back.flatten(2, 3).float() * 4)
    assert torch.equal(again.double().unflatten(2, (5, 64)) * scale_again.double()[..., None, None], back * 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int4_codes(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    x = (torch.randn(50, 64) * torch.logspace(-3, 3, 50)[:, None] + torch.linspace(-50, 50, 50)[:, None]).to(dtype)
    x[7] = 0.3  # all alike
    q, scale, low = quantize_int4(x)
    assert int(q.max()) == 15
    assert not bool(q[7].any())
    back = q.double() * scale.double()[:, None] + low.double()[:, None]
    # Half a step; the minimum is rounded by 2^-11 of itself, and 15 steps by as much, which the clamping cuts off.
    step = scale.double()[:, None]
    bound = step * (0.5 + 15 * 2**-11) + low.double().abs()[:, None] * 2**-11 + 6e-8 * 16
    assert bool(((back - x.double()).abs() <= bound).all())


@pytest.mark.parametrize(("group", "dim"), [(64, 16), (32, 96), (64, 128)])
def test_int4_layout_is_the_documented_one(group: int, dim: int) -> None:
    torch.manual_seed(3)
    layer = Int4KIVICache.layer_class(group_tokens=group, sinks=3, rotate_keys=False)
    layer.update(*torch.randn(2, 2, 2, 200, dim))
    k_data, k_params, _, k_sinks, v_data, v_params, _, _, lengths = layer.storage
    keys, values = (layer.expand(which, 200, torch.float32) for which in ("keys", "values"))
    parts = value_groups(dim)
    assert bool((lengths == 200).all())
    for t, c in ((0, 0), (1, 1), (70, dim - 1), (127, 7), (37, dim // 2)):
        half = 4 * (c % 2)
        q = k_data[1, 1, t, c // 2].int() >> half & 15
        expected = q * k_params[1, 1, t // group, 0, c].float() + k_params[1, 1, t // group, 1, c].float()
        torch.testing.assert_close(keys[1, 1, 3 + t, c], expected)
        q = v_data[1, 1, t // 8, c, t % 8 // 2].int() >> 4 * (t % 2) & 15
        scale, low = v_params[1, 1, t // group, :, c // (dim // parts), t % group].float()
        torch.testing.assert_close(values[1, 1, 3 + t, c], q * scale + low)
    assert torch.equal(keys[:, :, :3], k_sinks)


def test_value_groups_are_equal_and_at_most_64_channels() -> None:
    for dim in range(2, 258, 2):
        parts = value_groups(dim)
        assert dim % parts == 0
        assert dim // parts <= 64


def test_int4_mistakes_are_named() -> None:
    config = make_llama().config
    with pytest.raises(ValueError, match="group_tokens=48: allowed are 32, 64"):
        Int4KIVICache(config, group_tokens=48)
    with pytest.raises(ValueError, match="sinks=-1"):
        Int4KIVICache(config, sinks=-1)
    with pytest.raises(Unsupported, match="an even head size, not 15"):
        Int4KIVICache(config).update(*torch.randn(2, 1, 2, 3, 15), 0)


def test_sinks_are_exact_and_spare_the_others_their_range() -> None:
    torch.manual_seed(4)
    key, value = torch.randn(2, 1, 1, 132, 64)
    key[..., 0, :] *= 30  # the first token
    errors = {}
    for sinks in (0, 4):
        layer = Int4KIVICache.layer_class(sinks=sinks)
        layer.update(key, value)
        back = layer.expand("keys", 132, torch.float32)
        errors[sinks] = float((back - key)[:, :, 4:68].square().mean().sqrt())
        if sinks:
            torch.testing.assert_close(back[:, :, :4], key[:, :, :4], rtol=0, atol=1e-4)
    assert errors[4] < 0.2 * errors[0]
