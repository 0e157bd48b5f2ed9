"""Lower precision for single matrix products, without changing what the user has set for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def tensor_float32() -> Iterator[None]:
    """Within it float32 matrix products on CUDA round their factors to 11 significant bits (TF32) and add in float32.

    On GPUs of compute capability 8.0 and newer that is some eight times faster. bf16 and fp16 values have no more bits,
    so products of these are exact. Elsewhere it changes nothing. The setting is the process's: other threads' products
    are rounded alike meanwhile.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "none"  # what is set for all backends holds
    inherited = matmul.fp32_precision == before
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = "none" if inherited else before
