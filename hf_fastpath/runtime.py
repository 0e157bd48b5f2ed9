"""Making sure that the compiled kernels are there before a CUDA tensor needs them."""

from __future__ import annotations

import functools

import torch

from hf_fastpath.errors import Unsupported


@functools.cache
def _load() -> None:
    from hf_fastpath.build import load_library

    result = load_library()
    if not result.loaded:
        raise Unsupported(f"the CUDA kernels are not available: {result.reason}")


def require_device(device: torch.device) -> None:
    """Returns when ops can run on ``device``; on CUDA this builds or loads the kernels the first time.

    Raises:
        Unsupported: the device is neither a CPU nor a CUDA GPU, or the kernels cannot be built or loaded. The message
            says why and what to do.
    """
    if device.type == "cuda":
        _load()
    elif device.type != "cpu":
        raise Unsupported(f"device {str(device)!r}: allowed are 'cpu' and 'cuda'")
