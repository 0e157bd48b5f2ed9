"""The kernels that append to the caches, on the GPU: the references' bits, and nothing written beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from append_cases import FORMATS, Case, Store, check_uncounted
from gpu_common import DEVICE, randn
from kernel_cases import DTYPES, Target, generator

from hf_fastpath import ops
from hf_fastpath.ops import QKTransform

pytestmark = pytest.mark.gpu

RAW = Target(DEVICE, torch.ops.hf_fastpath)
PER_HEAD = [name for name in FORMATS if name != "h2o"]


@pytest.mark.parametrize("cache", PER_HEAD)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 32, 48, 64, 80, 96, 128, 256])
def test_plain_appends(cache: str, dtype: Any, dim: int) -> None:
    Case(cache, dtype, dim, ratio=0, steps=(3, 70, 1, 8, 52, 1, 1, 600, 9), kv_heads=3).check(RAW)


@pytest.mark.parametrize("cache", PER_HEAD)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("change", [
    {"rotary": 64}, {"rotary": 32, "dim": 80, "ratio": 1}, {"norm": True, "rotary": 128, "dim": 128, "ratio": 4},
    {"rotate": True, "dim": 96}, {"rotate": True, "rotary": 64, "shared_angles": True, "ratio": 7},
    {"norm": True, "rotate": True, "rotary": 256, "dim": 256}, {"norm": True, "rotary": 64, "vectors": False},
], ids=str)  # fmt: skip
def test_fused_appends(cache: str, dtype: Any, change: dict[str, Any]) -> None:
    Case(cache, dtype, **{"steps": (1, 2, 65, 1, 300)} | change).check(RAW)


@pytest.mark.parametrize("tokens", [1, 8, 9, 600])
def test_tokens_that_nobody_counts(tokens: int) -> None:
    check_uncounted(RAW, tokens)
    key = torch.zeros(1, 2, 17, 64, dtype=torch.float16, device=DEVICE)
    small = torch.zeros(1, 2, 16, 64, dtype=torch.float16, device=DEVICE)
    with pytest.raises(RuntimeError, match="there is room for 16 tokens, got 17"):
        ops.kv_static_append(key, key, (small, small, None))


@pytest.mark.parametrize("cache", PER_HEAD)
@pytest.mark.parametrize("batch", [1, 3, 16, 64])
def test_batches(cache: str, batch: int) -> None:
    options = {"kv_heads": 8, "ratio": 4, "dim": 128, "rotary": 128, "rotate": cache != "static"}
    Case(cache, torch.bfloat16, batch=batch, steps=(61, 1, 1, 1, 1), **options).check(RAW)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{"group_tokens": 32, "sinks": 0}, {"sinks": 70}], ids=str)
def test_int4_groups_and_sinks(options: dict[str, Any], dtype: Any) -> None:
    steps = (2, 90, 5, 33, 1, 200)
    Case("int4", dtype, 64, steps=steps, rotary=64, options=tuple(options.items())).check(RAW)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 64, 128, 256])
@pytest.mark.parametrize("budget", [16, 1040])
def test_h2o_evicts(dtype: Any, dim: int, budget: int) -> None:
    options = (("budget", budget), ("window", 5), ("sinks", 2))
    shape = {"kv_heads": 3, "rotary": dim, "rotate": True}
    Case("h2o", dtype, dim, steps=(1,) * 40, options=options, **shape).check(RAW)


def test_h2o_evicts_what_got_the_least() -> None:
    """Random scores and padding, equal ones and a NaN among them, in all slots."""
    layer = FORMATS["h2o"].layer_class(budget=300, window=40, sinks=3)
    rng = generator(11)
    key = randn(rng, 3, 2, 1, 64, dtype=torch.bfloat16)
    store = Store.like(layer.allocate(key.cpu(), key.cpu(), 256), DEVICE)
    scores, positions, counts = store.views[4:]
    scores.copy_(torch.randint(0, 40, scores.shape, generator=rng) / 8)
    positions.copy_(torch.rand(3, 2, 500, generator=rng).argsort(-1)[..., :300])
    scores[2, 1, 77] = float("nan")
    counts[..., 0] = 500
    counts[1, :, 1] = 200
    for _ in range(50):
        expected = [view.cpu() for view in store.views]
        args = (None, key, key, None, None, 0.0, None, None, False, None)
        torch.ops.hf_fastpath.kv_h2o_append(*args, *store.views, 40, 3)
        on_cpu = (x.cpu() if isinstance(x, torch.Tensor) else x for x in args)
        torch.ops.hf_fastpath.kv_h2o_append(*on_cpu, *expected, 40, 3)
        store.check(expected)


@pytest.mark.parametrize("cache", PER_HEAD)
def test_special_values(cache: str) -> None:
    """Ties, zeros, scales that round to 0 or are subnormal or overflow; infinity and NaN where it says what."""
    for dtype in DTYPES:
        key = torch.zeros(1, 1, 320, 64, dtype=dtype)
        key[0, 0, 1] = torch.arange(64) * 2.0 + 1
        key[0, 0, 2] = (torch.arange(64) - 32) * 0.5
        key[0, 0, 2, 0] = 127.0
        key[0, 0, 64:128] = 1e-7
        key[0, 0, 132] = torch.linspace(-1e-5, 1e-5, 64)
        key[0, 0, 200] = 60000.0
        if cache != "int4":
            key[0, 0, 260, 10] = float("inf")
            key[0, 0, 300, 20] = float("nan")
            key[0, 0, 318] = 3e38 if dtype == torch.bfloat16 else 65504.0
        store, expected = (Case(cache, dtype, batch=1, kv_heads=1, steps=(320,)).new_store(d) for d in (DEVICE, "cpu"))
        append = getattr(ops, f"kv_{cache}_append")
        append(key.to(DEVICE), -key.to(DEVICE), store.views)
        append(key, -key, expected.views)
        store.check(expected.views)


def filled(cache: str, dtype: Any, dim: int, tokens: int, **options: Any) -> Any:
    """A layer on the GPU, whatever its attention runs on."""
    layer = FORMATS[cache].layer_class(**options)
    key, value = (randn(generator(i, tokens), 2, 3, tokens, dim, dtype=dtype) for i in range(2))
    layer.storage = [x.to(DEVICE) for x in layer.new_storage(key, -(-tokens // 64) * 64)]
    getattr(ops, f"kv_{cache}_append")(key, value, layer.storage)
    layer.length = tokens
    return layer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 48, 64, 80, 128, 256])
@pytest.mark.parametrize("tokens", [1, 3, 63, 64, 69, 200, 1000])
def test_dequantize_has_the_references_bits(tokens: int, dim: int, dtype: Any) -> None:
    cases = [("fp8", {}), ("int4", {}), ("int4", {"group_tokens": 32, "sinks": 0}), ("int4", {"sinks": 70})]
    for cache, options in cases:
        layer = filled(cache, dtype, dim, tokens, **options)
        for which in ("keys", "values"):
            for start, stop in {(0, tokens), (0, max(tokens - 13, 1)), (tokens // 3, tokens), (tokens - 1, tokens)}:
                got = layer.expand_stored(which, slice(start, stop), dtype)
                layer.reference = True
                assert torch.equal(got, layer.expand_stored(which, slice(start, stop), dtype))
                layer.reference = False


@pytest.mark.parametrize("cache", PER_HEAD)
def test_a_captured_append_goes_on_where_the_cache_ends(cache: str) -> None:
    case = Case(cache, torch.bfloat16, steps=(100,), ratio=2)
    key, value, query, _ = Case(cache, torch.bfloat16, steps=(1,)).inputs(0, DEVICE)
    store, expected = case.new_store(DEVICE), case.new_store("cpu").views
    append: Callable[..., Any] = getattr(ops, f"kv_{cache}_append")
    append(key, value, store.views, query=query)
    torch.cuda.synchronize()
    store.views[-1].zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        append(key, value, store.views, query=query)
    for number in range(80):
        key.copy_(randn(generator(number), *key.shape, dtype=key.dtype))
        graph.replay()
        append(key.cpu(), value.cpu(), expected)
    store.check(expected)


def test_the_comparison_sees_one_wrong_bit() -> None:
    case = Case("fp8", torch.bfloat16, steps=(70,), ratio=0)
    store, expected = case.new_store(DEVICE), case.new_store("cpu").views
    key, value, _, _ = case.inputs(0, DEVICE)
    ops.kv_fp8_append(key, value, store.views)
    ops.kv_fp8_append(key.cpu(), value.cpu(), expected)
    store.check(expected)
    store.views[0].view(torch.uint8)[1, 1, 63, 63] ^= 1
    with pytest.raises(AssertionError):
        store.check(expected)


def test_appending_nothing_writes_nothing() -> None:
    case = Case("int8", torch.float16)
    store = case.new_store(DEVICE)
    before = [view.cpu() for view in store.views]
    empty = torch.empty(2, 2, 0, 64, dtype=torch.float16, device=DEVICE)
    ops.kv_int8_append(empty, empty, store.views)
    store.check(before)


def test_bad_arguments_are_refused_in_words() -> None:
    case = Case("int8", torch.float16, batch=1, steps=(3,))
    views = case.new_store(DEVICE).views
    key, value, query, _ = case.inputs(0, DEVICE)
    k_data, k_scale, v_data, v_scale, lengths = views
    cos = randn(generator(3), 1, 3, 64, dtype=torch.float16)
    norm = torch.ones(64, dtype=torch.float16, device=DEVICE)
    cases: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("key must be float16 or bfloat16", (key.float(), value.float(), views), {}),
        ("same dtype", (key, value.bfloat16(), views), {}),
        ("multiples of 8 up to 256, got 60", (key[..., :60], value[..., :60], views), {}),
        ("k_data must be int8", (key, value, (k_data.float(), *views[1:])), {}),
        ("k_scale must have shape", (key, value, (k_data, k_scale[:, :, :4], v_data, v_scale, lengths)), {}),
        ("value must have shape", (key, value[:, :, :2], views), {}),
        ("v_scale must be on cuda:0", (key, value, (k_data, k_scale, v_data, v_scale.cpu(), lengths)), {}),
        ("lengths must be int32", (key, value, (*views[:4], lengths.long())), {}),
        ("query must have shape", (key, value, views), {"query": query[:, :, :2]}),
        ("not a multiple of H_kv 2", (key, value, views), {"query": query[:, :3]}),
        ("cos and sin come together", (key, value, views), {"transform": QKTransform(cos=cos)}),
        ("multiple of 16", (key, value, views), {"transform": QKTransform(cos=cos[..., :40], sin=cos[..., :40])}),
        ("q_norm and k_norm come together", (key, value, views),
         {"transform": QKTransform(k_norm=norm), "query": query}),
    ]  # fmt: skip
    for message, args, kwargs in cases:
        with pytest.raises(RuntimeError, match=message):
            ops.kv_int8_append(*args, **kwargs)
    h2o = Case("h2o", torch.float16, batch=1, options=(("budget", 16),)).new_store(DEVICE).views
    with pytest.raises(RuntimeError, match="leave none of 16 slots"):
        ops.kv_h2o_append(key[:, :, :1], value[:, :, :1], h2o, 15, 2)
