"""A token's append and attention in one kernel, in the emulator: the bits of the two kernels."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from emulated import EmulatedOps
from emulator import needs_emulator
from kernel_cases import DTYPES, Target
from step_cases import FORMATS, Step

pytestmark = needs_emulator


@pytest.fixture
def target() -> Target:
    return Target("cpu", EmulatedOps())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("dim", "dtype"), list(zip((16, 64, 80, 128, 256), itertools.cycle(DTYPES))), ids=str)
def test_lengths_and_dimensions(form: str, dim: int, dtype: Any, target: Target) -> None:
    """Those where the new token begins a tile, ends one, and where there are several CTAs with and without work."""
    for lengths in ([0, 1, 15], [31, 63, 64], [127, 300, 3]):
        Step(form, dtype, lengths, dim=dim, steps=3).check(target)
    Step(form, dtype, [259, 1100], dim=dim, room=700).check(target)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("change", [
    {"rotary": 64}, {"rotary": 32, "dim": 80, "kv_heads": 4}, {"norm": True, "rotary": 128, "dim": 128, "heads": 8},
    {"rotate": True, "dim": 96}, {"rotate": True, "rotary": 64},
    {"norm": True, "rotate": True, "rotary": 256, "dim": 256},
    {"norm": True, "rotary": 64, "rotate": True, "heads": 16, "kv_heads": 2}, {"masked": True, "rotary": 64},
    {"norm": True, "rotary": 64, "vectors": False}, {"rotary": 64, "rotate": True, "heads": 9, "kv_heads": 1},
], ids=str)  # fmt: skip
def test_transforms_ratios_and_masks(form: str, change: dict[str, Any], target: Target) -> None:
    for dtype, lengths in zip(DTYPES, ([40, 7], [300, 129]), strict=True):
        Step(form, dtype, lengths, **change).check(target)


@pytest.mark.parametrize("form", FORMATS)
def test_many_tiles_of_a_warp(form: str, target: Target) -> None:
    Step(form, torch.bfloat16, [2527, 4095], kv_heads=1, rotary=64, rotate=True).check(target)


@pytest.mark.parametrize("form", FORMATS)
def test_ctas_in_any_order(form: str, target: Target) -> None:
    try:
        for order in range(1, 5):
            target.ops.run_ctas_in_order(order)
            Step(form, torch.float16, [600, 0, 1500], rotary=64, steps=3, room=1000).check(target)
    finally:
        target.ops.run_ctas_in_order(0)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("length", [5, 63, 64, 255, 300, 1100])
def test_a_length_that_the_kernel_before_changes_late(form: str, length: int, target: Target) -> None:
    # With several CTAs, one that was told too much may read where another one stores the token, and throws it away: a
    # race that does not matter, but one.
    for amount in (1, 5, 17, 64, 200, 5000, *((-1, -40, -100000) if length <= 64 else ())):
        target.ops.assume_written_since(amount)
        try:
            Step(form, torch.float16, [length, 1]).check(target)
        finally:
            target.ops.assume_written_since(0)
