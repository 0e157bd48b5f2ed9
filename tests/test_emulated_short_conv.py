"""The short convolution: the CUDA kernels in the emulator, against float64."""

from __future__ import annotations

from typing import Any

import kernel_cases
import pytest
import torch
from conv_cases import DTYPES, MASKS, FusedStep, ShortConvCase
from emulated import EmulatedOps
from emulator import KernelFault, needs_emulator
from fused_cases import make_fused_inputs
from kernel_cases import Target, generator

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


@pytest.mark.parametrize("dtype", kernel_cases.DTYPES, ids=str)
@pytest.mark.parametrize(("channels", "k", "group", "taps"), [
    (16, 96, 32, 3), (64, 576, 64, 4), (80, 1152, 128, 3), (48, 256, 32, 2), (32, 640, 128, 8), (16, 4224, 64, 3),
])  # fmt: skip
def test_fused_with_the_projection(channels: int, k: int, group: int, taps: int, dtype: torch.dtype) -> None:
    rng, on = generator(channels, k, taps), target()
    weight = kernel_cases.make_weight(on, rng, 3 * channels, k, group, dtype, with_zeros=taps != 3)
    inputs = make_fused_inputs(on, rng, 16, weight, dtype, norm=True, residual=False)
    FusedStep.make(on, rng, taps, channels, dtype).check(inputs, weight)


def test_what_the_fused_one_does_not_take() -> None:
    rng, on = generator(1), target()
    weight = kernel_cases.make_weight(on, rng, 72, 128, 32, torch.float16)
    inputs = make_fused_inputs(on, rng, 16, weight, torch.float16, norm=True, residual=False)
    with pytest.raises(KernelFault, match="CUDA error 1"):  # 24 channels
        FusedStep.make(on, rng, 3, 24, torch.float16).run(inputs, weight, slice(0, 1))
