"""The kernel that sums attention over queries, in the emulator, against float64."""

from __future__ import annotations

import pytest
import torch
from emulated import EmulatedOps
from emulator import needs_emulator
from kernel_cases import DTYPES, Target
from received_cases import Received

pytestmark = needs_emulator


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("change", [
    {}, {"dim": 48, "tokens": 129, "ratio": 1}, {"old": 7, "start": 30, "tokens": 1}, {"dim": 128, "padding": True},
    {"old": 40, "start": 90, "padding": True, "kv_heads": 1}, {"dim": 256, "tokens": 66, "batch": 1, "ratio": 1},
], ids=str)  # fmt: skip
def test_against_float64(change: dict[str, int], dtype: torch.dtype) -> None:
    Received(dtype, **change).check(Target("cpu", EmulatedOps()))
