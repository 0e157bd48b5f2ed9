"""tests/kernel_cases.py on the GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any

import kernel_cases
import torch
from kernel_cases import Target

from hf_fastpath import ops

DEVICE = "cuda"
GPU = Target(DEVICE, ops)

make_weight = partial(kernel_cases.make_weight, GPU)
poison = partial(kernel_cases.poison, device=DEVICE)


def graph_nodes(call: Callable[[], Any]) -> int:
    """How many nodes, kernels and copies, a CUDA graph of a call has, which was made before."""
    graph, count = torch.cuda.CUDAGraph(keep_graph=True), ctypes.c_size_t()
    with torch.cuda.graph(graph):
        call()
    assert torch.version.cuda is not None
    runtime = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.split('.')[0]}")
    raw = ctypes.c_void_p(graph.raw_cuda_graph())
    assert runtime.cudaGraphGetNodes(raw, None, ctypes.byref(count)) == 0
    return count.value


def randn(rng: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=rng).to(dtype).to(DEVICE)
