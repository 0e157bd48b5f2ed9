"""The GPU tests need a CUDA device and the compiled kernels; without a device they are skipped, with the reason."""

from __future__ import annotations

import pytest
import torch

from hf_fastpath.build import load_library


@pytest.fixture(scope="session", autouse=True)
def _kernels() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    result = load_library()
    assert result.loaded, result.reason  # with a device, a library that does not load is a failure, not a skip
