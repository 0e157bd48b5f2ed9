"""The angles of rotary embeddings on the GPU: the bits of transformers' modules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from gpu_common import graph_nodes, poison
from kernel_cases import generator
from rotary_cases import DTYPES, ROPES, SHAPES, check_angles, frequencies, positions_of, rotary_embedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hf_fastpath.modules import RotaryAngles
from hf_fastpath.ops import rope_angles

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (64, 1, 64), (2, 4096, 64)], ids=str)
def test_against_float64(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    positions, inv_freq = positions_of(generator(*shape), *shape[:2]).cuda(), frequencies(shape[2]).cuda()
    for _ in range(2):
        poison(*shape[:2], 2 * shape[2], dtype=dtype)
    found = rope_angles(positions, inv_freq, 1.25, torch.empty(0, dtype=dtype, device="cuda"))
    check_angles(positions, inv_freq, 1.25, found, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rope_type", ROPES)
def test_the_bits_are_transformers(rope_type: str, dtype: torch.dtype) -> None:
    """One float32 product, cosine and sine of the same library: nothing is rounded otherwise. PyTorch's own matrix
    product, which transformers 5.17 takes the angles from, is that product as long as TF32 is off."""
    assert not torch.backends.cuda.matmul.allow_tf32
    stock = rotary_embedding(rope_type, **ROPES[rope_type]).cuda()
    fast = copy.deepcopy(stock)
    fast.__class__ = type("Fast", (RotaryAngles, LlamaRotaryEmbedding), {})
    for rows, tokens in ((1, 1), (3, 1), (64, 1), (2, 7), (1, 65536)):
        positions = positions_of(generator(rows, tokens), rows, tokens).cuda()
        x = torch.empty(rows, 1, 64, dtype=dtype, device="cuda")
        with torch.inference_mode():
            found, expected = fast(x, positions), stock(x, positions)
            for got, want in zip(found, expected, strict=True):
                assert got.dtype is want.dtype is dtype
                assert torch.equal(got, want)
            if tokens == 1:
                assert graph_nodes(lambda positions=positions, x=x: fast(x, positions)) == 1


def test_in_a_graph_between_other_kernels() -> None:
    """It begins early, and reads the positions that the kernel before wrote in this replay."""
    inv_freq, like = frequencies(64).cuda(), torch.empty(0, dtype=torch.bfloat16, device="cuda")
    positions = torch.zeros(64, 1, dtype=torch.long, device="cuda")

    def chain() -> list[torch.Tensor]:
        out: list[torch.Tensor] = []
        for _ in range(20):
            positions.add_(977)
            out += rope_angles(positions, inv_freq, 1.0, like)
        return out

    chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain()
    for start in (0, 5, 131):
        positions.fill_(start)
        graph.replay()
        found = [tensor.clone() for tensor in out]
        positions.fill_(start)
        for got, want in zip(found, chain(), strict=True):
            assert torch.equal(got, want)


def test_bad_arguments_are_refused_in_words() -> None:
    positions, inv_freq = torch.zeros(2, 3, dtype=torch.long, device="cuda"), frequencies(8).cuda()
    x = torch.empty(1, dtype=torch.bfloat16, device="cuda")
    bad: list[tuple[str, tuple[Any, ...]]] = [
        (r"positions must have shape \(B, T\)", (positions[0], inv_freq, 1.0, x)),
        ("positions must be int64", (positions.int(), inv_freq, 1.0, x)),
        ("positions must be contiguous", (positions.T, inv_freq, 1.0, x)),
        ("inv_freq must be float32", (positions, inv_freq.half(), 1.0, x)),
        ("inv_freq must be contiguous", (positions, inv_freq[::2], 1.0, x)),
        ("inv_freq must not be empty", (positions, inv_freq[:0], 1.0, x)),
        ("like, if not float32, must be float16 or bfloat16", (positions, inv_freq, 1.0, x.double())),
    ]
    for message, args in bad:
        with pytest.raises(RuntimeError, match=message):
            rope_angles(*args)
    assert rope_angles(positions[:0], inv_freq, 1.0, x)[0].shape == (0, 3, 16)
