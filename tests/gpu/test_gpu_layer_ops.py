"""What is between a layer's products, on the GPU: against float64 and against transformers' modules."""

from __future__ import annotations

import pytest
import torch
from fused_cases import EPS
from gpu_common import GPU, poison, randn
from kernel_cases import DTYPES, generator, shifted
from layer_cases import NORM_SHAPES, SWIGLU_SHAPES, check_norms, check_swiglu_op, norm_inputs

from hf_fastpath.ops import add_rms_norm, rms_norm, swiglu

pytestmark = pytest.mark.gpu

WIDE = [(64, 4096), (64, 2048), (512, 4096), (3, 16384)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [*NORM_SHAPES, *WIDE])
def test_norms(rows: int, columns: int, dtype: torch.dtype) -> None:
    inputs = norm_inputs(GPU, generator(rows, columns, DTYPES.index(dtype)), rows, columns, dtype)
    poison(rows, columns, dtype=dtype)
    check_norms(GPU, *inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [*SWIGLU_SHAPES, (64, 14336), (70000, 8)])
def test_swiglu(rows: int, columns: int, dtype: torch.dtype) -> None:
    x = randn(generator(rows, columns, DTYPES.index(dtype)), rows, 2 * columns, dtype=dtype) * 3
    poison(rows, columns, dtype=dtype)
    out = swiglu(x)
    check_swiglu_op(x, out)
    gate, up = x.chunk(2, dim=-1)
    assert torch.equal(out, torch.nn.functional.silu(gate) * up)


def test_one_follows_the_other_in_a_graph() -> None:
    """Kernels that begin early read what the ones before wrote in this replay."""
    rng = generator(4)
    x, residual = randn(rng, 64, 4096, dtype=torch.bfloat16), randn(rng, 64, 4096, dtype=torch.bfloat16)
    weight = randn(rng, 4096, dtype=torch.bfloat16)

    def chain() -> torch.Tensor:
        y = x
        for _ in range(20):
            total, normalized = add_rms_norm(y, residual, weight, EPS)
            y = rms_norm(torch.cat([swiglu(total), swiglu(normalized)], dim=1), weight, EPS)
        return y

    chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain()
    for _ in range(5):
        x.copy_(randn(rng, 64, 4096, dtype=torch.bfloat16))
        graph.replay()
        got = out.clone()
        assert torch.equal(got, chain())


def test_bad_arguments_are_refused_in_words() -> None:
    x, weight = randn(generator(1), 4, 96, dtype=torch.float16), randn(generator(2), 96, dtype=torch.float16)
    for message, call in [
        ("x must be float16 or bfloat16", lambda: rms_norm(x.float(), weight, EPS)),
        ("multiple of 8, got 92", lambda: rms_norm(x[:, :92].contiguous(), weight[:92], EPS)),
        ("x must be aligned to 16 bytes", lambda: rms_norm(shifted(x), weight, EPS)),
        ("weight and x must have the same dtype", lambda: rms_norm(x, weight.bfloat16(), EPS)),
        (r"weight must have shape \(K,\)", lambda: rms_norm(x, weight[:88], EPS)),
        ("eps must not be negative", lambda: rms_norm(x, weight, -1.0)),
        (r"residual must have shape \(M, K\)", lambda: add_rms_norm(x, x[:3], weight, EPS)),
        ("residual and x must have the same dtype", lambda: add_rms_norm(x, x.bfloat16(), weight, EPS)),
        ("positive multiple of 16, got 24", lambda: swiglu(x[:, :24].contiguous())),
        ("x must be contiguous", lambda: swiglu(x[:, :32])),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call()
    assert rms_norm(x[:0], weight, EPS).shape == (0, 96)
    assert swiglu(x[:0]).shape == (0, 48)
