"""The kernel that sums attention over queries, and the H2O cache's prefill with it, on the GPU."""

from __future__ import annotations

import pytest
import torch
from gpu_common import DEVICE, GPU, randn
from kernel_cases import DTYPES, generator
from received_cases import Received

from hf_fastpath import H2OKVCache
from hf_fastpath.ops import attn_prefill_h2o

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("change", [
    {}, {"dim": 48, "tokens": 129, "ratio": 1}, {"old": 7, "start": 30, "tokens": 1}, {"dim": 128, "padding": True},
    {"old": 40, "start": 90, "padding": True, "kv_heads": 1}, {"dim": 256, "tokens": 66}, {"dim": 80, "tokens": 1000},
    {"dim": 128, "tokens": 700, "old": 512, "start": 2000, "kv_heads": 8, "ratio": 4}, {"batch": 16, "ratio": 7},
], ids=str)  # fmt: skip
def test_against_float64(change: dict[str, int], dtype: torch.dtype) -> None:
    Received(dtype, **change).check(GPU)


def test_bad_arguments_are_refused_in_words() -> None:
    from hf_fastpath.ops import attn_received

    query = randn(generator(1), 1, 4, 5, 64, dtype=torch.float16)
    lse = torch.zeros(1, 4, 5, device=DEVICE)
    positions = torch.zeros(1, 2, 3, dtype=torch.int32, device=DEVICE)
    key = query[:, :2].contiguous()
    for message, args in [
        ("not a multiple of H_kv 3", (query, query[:, :3].contiguous(), lse, positions, None, 0, 1.0)),
        ("at least the queries' 5 tokens, got 4", (query, key[:, :, :4].contiguous(), lse, positions, None, 0, 1.0)),
        ("lse must be float32", (query, key, lse.half(), positions, None, 0, 1.0)),
        ("at least 6 columns", (query, key.repeat(1, 1, 2, 1)[:, :, :6].contiguous(), lse, positions,
                                torch.ones(1, 5, 5, dtype=torch.bool, device=DEVICE), 1, 1.0)),
        ("key must be contiguous", (query, key.mT.contiguous().mT, lse, positions, None, 0, 1.0)),
    ]:  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            attn_received(*args)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding", [False, True])
def test_prefill_agrees_with_the_reference(padding: bool, dtype: torch.dtype) -> None:
    """Chunk after chunk, the reference continuing from the same storage each time: the same output, scores and, where
    scores differ enough, the same tokens."""
    layer = H2OKVCache.layer_class(budget=128, window=32, sinks=4)
    rng, start = generator(7), 0
    key = randn(rng, 2, 2, 1, 64, dtype=dtype)
    layer.storage = layer.new_storage(key, 256)
    for tokens in (60, 50, 200, 33):
        key, value = (randn(rng, 2, 2, tokens, 64, dtype=dtype) for _ in range(2))
        query = randn(rng, 2, 8, tokens, 64, dtype=dtype)
        mask = None
        if padding:
            column = torch.arange(start + tokens, device=DEVICE)
            causal = column <= torch.arange(start, start + tokens, device=DEVICE)[:, None]
            mask = torch.stack([causal, causal & (column >= 20)])
        expected = [tensor.clone() for tensor in layer.storage]
        rule = (start, 0.125, 32, 4)
        torch.cuda.set_sync_debug_mode("error")
        try:
            out = attn_prefill_h2o(query, key, value, layer.storage, mask, *rule)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        want = attn_prefill_h2o(query, key, value, expected, mask, *rule, reference=True)
        eps = torch.finfo(dtype).eps
        # Probabilities and the result are rounded to the dtype.
        assert float((out.double() - want.double()).norm() / want.double().norm()) < 2 * eps
        assert torch.equal(layer.storage[6], expected[6])
        used = min(start + tokens, 128)
        for b in range(2):
            for h in range(2):
                got, exact = (dict(zip(s[5][b, h, :used].tolist(), s[4][b, h, :used].tolist(), strict=True))
                              for s in (layer.storage, expected))  # fmt: skip
                both = got.keys() & exact.keys()
                assert len(both) >= 0.97 * used
                assert all(abs(got[n] - exact[n]) <= 2e-3 * max(exact[n], 1e-2) for n in both)
        start += tokens
