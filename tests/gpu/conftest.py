"""The GPU tests need a CUDA device and the compiled kernels; without a device they are skipped, with the reason."""

from __future__ import annotations

import os

import pytest
import torch

from hf_fastpath.build import load_library


@pytest.fixture(scope="session", autouse=True)
def _kernels() -> None:
    if not torch.cuda.is_available():
        # `make gpu-test` sets it: there, a machine without a GPU is a failure.
        required = "gpu" in os.environ.get("HF_FASTPATH_REQUIRE", "")
        (pytest.fail if required else pytest.skip)("no CUDA device")
    result = load_library()
    assert result.loaded, result.reason  # with a device, a library that does not load is a failure, not a skip
