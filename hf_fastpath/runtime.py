"""Making sure that the compiled kernels are there before a CUDA tensor needs them."""

from __future__ import annotations

import functools
from typing import Any

import torch

from hf_fastpath.errors import Unsupported

_KERNEL_DTYPES = (torch.float16, torch.bfloat16)


@functools.cache
def _library_reason() -> str:
    from hf_fastpath.build import load_library

    result = load_library()
    return "" if result.loaded else f"the CUDA kernels are not available: {result.reason}"


@functools.cache
def gpu_properties(device: torch.device) -> Any:
    """torch.cuda.get_device_properties(): what a kernel is chosen by, at every call."""
    return torch.cuda.get_device_properties(device)


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured of what runs on ``device``."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@functools.cache
def _gpu_reason(device: torch.device) -> str:
    from hf_fastpath.build import MIN_CAPABILITY

    capability = torch.cuda.get_device_capability(device)
    if capability >= MIN_CAPABILITY:
        return ""
    wanted = ".".join(map(str, MIN_CAPABILITY))
    found = ".".join(map(str, capability))
    return f"{torch.cuda.get_device_name(device)} has compute capability {found}; the kernels need {wanted} or newer"


def why_no_kernels(device: torch.device, dtype: torch.dtype | None = None) -> str:
    """Why the kernels cannot run on a CUDA ``device`` (for a model of ``dtype``); "" when they can, and on the CPU.

    Builds or loads the kernels the first time.
    """
    if device.type != "cuda":
        return ""
    if dtype is not None and dtype not in _KERNEL_DTYPES:
        return f"the kernels need a float16 or bfloat16 model, not {dtype}: convert it, model.to(torch.bfloat16)"
    return _gpu_reason(device) or _library_reason()


def require_device(device: torch.device) -> None:
    """Returns when ops can run on ``device``; on CUDA this builds or loads the kernels the first time.

    Raises:
        Unsupported: the device is neither a CPU nor a CUDA GPU, or the kernels cannot be built or loaded. The message
            says why and what to do.
    """
    if device.type not in ("cpu", "cuda"):
        raise Unsupported(f"device {str(device)!r}: allowed are 'cpu' and 'cuda'")
    if reason := why_no_kernels(device):
        raise Unsupported(reason)
