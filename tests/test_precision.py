"""TF32 for single products leaves the user's settings as they were, however they were set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from hf_fastpath.precision import tensor_float32


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    yield
    torch.backends.fp32_precision = "none"
    torch.backends.cuda.matmul.fp32_precision = "none"


@pytest.mark.parametrize("general", ["none", "ieee", "tf32"])
@pytest.mark.parametrize("products", ["none", "ieee", "tf32"])
def test_settings_are_what_they_were(general: str, products: str) -> None:
    matmul = torch.backends.cuda.matmul
    torch.backends.fp32_precision = general
    matmul.fp32_precision = products
    before = matmul.fp32_precision
    with contextlib.suppress(KeyboardInterrupt), tensor_float32():
        assert matmul.fp32_precision == "tf32"
        raise KeyboardInterrupt
    assert (torch.backends.fp32_precision, matmul.fp32_precision) == (general, before)
    if products == "none":  # what is set for all backends still holds for products
        torch.backends.fp32_precision = "ieee"
        assert matmul.fp32_precision == "ieee"


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_settings_of_the_older_interface_too(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)
    try:
        before = torch.backends.cuda.matmul.allow_tf32
        with tensor_float32():
            pass
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cuda.matmul.allow_tf32 == before
    finally:
        torch.set_float32_matmul_precision("highest")
