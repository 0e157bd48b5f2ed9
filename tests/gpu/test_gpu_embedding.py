"""The embeddings of a few tokens on the GPU: the rows of nn.Embedding."""

from __future__ import annotations

import copy

import pytest
import torch
from gpu_common import graph_nodes, poison
from kernel_cases import DTYPES, generator
from torch import nn

from hf_fastpath.modules import DecodeEmbedding
from hf_fastpath.ops import embedding_rows

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
            assert torch.equal(fast(ids[:, -1:]), plain(ids[:, -1:]))
            assert graph_nodes(lambda ids=ids: fast(ids)) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (1, 2048), (3, 1032), (16, 4096), (300, 24)])
def test_the_op(rows: int, columns: int, dtype: torch.dtype) -> None:
    weight = torch.randn(50, columns, device="cuda").to(dtype)
    weight[3] = float("nan")
    ids = torch.randint(0, 50, (rows,), generator=generator(rows, columns)).cuda()
    ids[-1] = 3
    poison(rows, columns, dtype=dtype)
    got = embedding_rows(ids, weight)
    assert torch.equal(got.view(torch.int16), weight[ids].view(torch.int16))


def test_bad_arguments_are_refused_in_words() -> None:
    weight, ids = torch.zeros(50, 16, device="cuda").half(), torch.zeros(3, dtype=torch.long, device="cuda")
    for message, bad_ids, bad_weight in (
        ("ids must be int64", ids.int(), weight),
        ("ids must be contiguous", torch.stack((ids, ids), 1)[:, 0], weight),
        ("ids must be on cuda:0", ids.cpu(), weight),
        ("weight must be contiguous", ids, weight.T),
        ("D must be a positive multiple of 8, got 4", ids, weight[:, :4].contiguous()),
        ("weight must be float16 or bfloat16", ids, weight.float()),
    ):
        with pytest.raises(RuntimeError, match=message):
            embedding_rows(bad_ids, bad_weight)
