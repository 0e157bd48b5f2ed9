"""The embeddings of a few tokens on the GPU: the rows of nn.Embedding, by the kernel that it takes for more."""

from __future__ import annotations

import copy

import pytest
import torch
from gpu_common import graph_nodes
from kernel_cases import generator
from torch import nn

from hf_fastpath.modules import DecodeEmbedding

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("columns", [24, 100, 4096])
def test_the_same_rows_in_one_kernel(columns: int, dtype: torch.dtype) -> None:
    plain = nn.Embedding(1000, columns).to(dtype).cuda()
    fast = copy.deepcopy(plain)
    fast.__class__ = DecodeEmbedding
    with torch.inference_mode():
        for shape in ((1, 1), (2, 1), (3, 1), (16, 1), (2, 7), (17, 1), (64, 1)):
            ids = torch.randint(0, 1000, shape, generator=generator(*shape)).cuda()
            assert torch.equal(fast(ids), plain(ids))
            assert graph_nodes(lambda ids=ids: fast(ids)) == 1
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            fast(torch.randint(0, 1000, (16, 1)).cuda())
            torch.cuda.synchronize()
    if columns != 100:  # rows of whole 16 bytes
        assert any("vectorized_gather" in event.name for event in profile.events())
