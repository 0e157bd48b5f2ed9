"""The short convolution: the CUDA kernels in the emulator, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conv_cases import DTYPES, MASKS, ShortConvCase
from emulated_ops import EmulatedOps
from emulator import KernelFault, needs_emulator
from kernel_cases import Target

pytestmark = needs_emulator


def target(sm_count: int = 3) -> Target:
    return Target("cpu", EmulatedOps(sm_count))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("tokens", [1, 2, 9, 70])
def test_masks_and_lengths(tokens: int, mask: str, dtype: torch.dtype) -> None:
    ShortConvCase(dtype, tokens=tokens, mask=mask).check(target())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("taps", range(2, 9))
@pytest.mark.parametrize("tokens", [1, 5, 17])
def test_taps(taps: int, tokens: int, dtype: torch.dtype) -> None:
    for mask in ("none", "left"):
        ShortConvCase(dtype, tokens=tokens, taps=taps, mask=mask, biased=taps % 2 == 0).check(target())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("change", [
    {"channels": 37}, {"channels": 7, "batch": 1}, {"offset": 1}, {"offset": 8}, {"channels": 600, "batch": 1},
    {"channels": 520, "batch": 2, "offset": 8, "biased": False}, {"channels": 4, "mask": "holes"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("tokens", [1, 11])
def test_shapes_and_strides(change: dict[str, Any], tokens: int, dtype: torch.dtype) -> None:
    ShortConvCase(dtype, **({"tokens": tokens} | change)).check(target())


@pytest.mark.parametrize("tokens", [33, 64, 100])
def test_long_chunks(tokens: int) -> None:
    """No multiprocessor is to fill, so a chunk has all the tokens that it may have."""
    for mask in ("none", "left", "right"):
        ShortConvCase(torch.bfloat16, tokens=tokens, taps=4, mask=mask).check(target(sm_count=0))


def test_too_many_taps_are_refused() -> None:
    with pytest.raises(KernelFault, match="CUDA error 1"):  # cudaErrorInvalidValue, by the launcher
        ShortConvCase(torch.float16, taps=9).check(target())
