"""The kernels that append to the caches, in the emulator: the references' bits, and nothing written beside them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from append_cases import Case, check_uncounted
from emulated import EmulatedOps
from emulator import needs_emulator
from kernel_cases import DTYPES, Target

pytestmark = needs_emulator

EMULATED = ("static", "int8", "fp8", "int4")


@pytest.fixture
def target() -> Target:
    return Target("cpu", EmulatedOps())


@pytest.mark.parametrize("cache", EMULATED)
@pytest.mark.parametrize(("dim", "dtype"), list(zip((16, 64, 80, 128, 256), itertools.cycle(DTYPES))), ids=str)
def test_plain_appends(cache: str, dim: int, dtype: Any, target: Target) -> None:
    Case(cache, dtype, dim, ratio=0, steps=(3, 70, 1, 52, 1, 1, 130, 9), batch=1).check(target)


@pytest.mark.parametrize("cache", EMULATED)
@pytest.mark.parametrize("change", [
    {"rotary": 64}, {"rotary": 32, "dim": 80, "ratio": 1}, {"norm": True, "rotary": 128, "dim": 128, "ratio": 4},
    {"rotate": True, "dim": 96}, {"rotate": True, "rotary": 64, "shared_angles": True},
    {"norm": True, "rotate": True, "rotary": 256, "dim": 256}, {"norm": True, "rotary": 64, "vectors": False},
], ids=str)  # fmt: skip
def test_fused_appends(cache: str, change: dict[str, Any], target: Target) -> None:
    for dtype, steps in zip(DTYPES, ((1, 2, 65), (70, 1)), strict=True):
        Case(cache, dtype, **{"steps": steps} | change).check(target)


@pytest.mark.parametrize("options", [{"group_tokens": 32, "sinks": 0}, {"sinks": 70}], ids=str)
def test_int4_groups_and_sinks(options: dict[str, Any], target: Target) -> None:
    steps = (2, 90, 5, 33, 1)
    Case("int4", torch.float16, 64, steps=steps, rotary=64, options=tuple(options.items())).check(target)


@pytest.mark.parametrize("tokens", [1, 8, 9, 70])
def test_tokens_that_nobody_counts(tokens: int, target: Target) -> None:
    check_uncounted(target, tokens)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_h2o_evicts(dtype: Any, target: Target) -> None:
    options = (("budget", 16), ("window", 5), ("sinks", 2))
    Case("h2o", dtype, 64, steps=(1,) * 24, rotary=64, rotate=True, options=options).check(target)
