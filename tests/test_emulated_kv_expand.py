"""Tokens of the fp8 and int4 caches back to floats: the CUDA kernels in the emulator, with the references' bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from append_cases import FORMATS
from emulated import EmulatedOps
from emulator import needs_emulator
from kernel_cases import DTYPES, generator

from hf_fastpath import ops

pytestmark = needs_emulator


def filled(cache: str, dtype: torch.dtype, dim: int, tokens: int, **options: Any) -> Any:
    layer = FORMATS[cache].layer_class(**options)
    rng = generator(dim, tokens)
    key, value = (torch.randn(2, 2, tokens, dim, generator=rng).to(dtype) for _ in range(2))
    layer.storage = layer.new_storage(key, -(-tokens // 64) * 64)
    getattr(ops, f"kv_{cache}_append")(key, value, layer.storage)
    return layer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "tokens"), [(16, 3), (64, 64), (80, 69), (128, 200), (256, 130)])
@pytest.mark.parametrize(
    ("cache", "options"),
    [("fp8", {}), ("int4", {}), ("int4", {"group_tokens": 32, "sinks": 0}), ("int4", {"sinks": 70})],
    ids=["fp8", "int4", "int4-32", "int4-sinks"],
)
def test_any_part_has_the_references_bits(
    cache: str, options: dict[str, Any], dim: int, tokens: int, dtype: torch.dtype
) -> None:
    layer, emulated = filled(cache, dtype, dim, tokens, **options), EmulatedOps()
    whole = {which: layer.expand_stored(which, slice(0, tokens), dtype) for which in ("keys", "values")}
    for start, stop in {(0, tokens), (0, 1), (2, tokens), (tokens // 3, tokens - tokens // 4), (tokens - 1, tokens)}:
        for values, which in enumerate(("keys", "values")):
            out = torch.full((2, 2, stop - start, dim), 42.0, dtype=dtype)
            if cache == "fp8":
                data, scale, tail = layer.storage[3 * values : 3 * values + 3]
                emulated.kv_fp8_dequantize(data, scale, tail, layer.storage[-1], start, out)
            else:
                stored = layer.storage[4 * values : 4 * values + 4]
                emulated.kv_int4_dequantize(*stored, layer.storage[-1], bool(values), start, out)
            assert torch.equal(out, whole[which][:, :, start:stop]), (which, start, stop)
            assert torch.equal(layer.expand_stored(which, slice(start, stop), dtype), out)
