"""A mixture's router and experts on the GPU, against float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from gpu_common import GPU, poison, randn
from kernel_cases import DTYPES, generator, shifted
from moe_cases import Mixture, check_experts, check_norm, check_router, check_rows, make_mixture

from hf_fastpath.ops import moe_experts, moe_norm_router, moe_router
from hf_fastpath.ops.moe_experts import VARIANTS, moe_experts_reference
from hf_fastpath.ops.moe_router import moe_router_reference

pytestmark = pytest.mark.gpu

SHAPES = [  # rows, top_k, experts, experts in use, hidden and intermediate, groups, zero points
    (16, 4, 6, None, (128, 1184), (128, 32), True),
    (13, 2, 4, 2, (1152, 32), (128, 32), False),  # all rows on the same two experts
    (16, 3, 5, 4, (96, 160), (32, 32), True),
    (16, 3, 5, 4, (768, 512), (32, 64), False),
    (16, 3, 5, 4, (2304, 256), (128, 32), True),
    (16, 4, 8, None, (2048, 1792), (128, 128), True),
    (16, 8, 9, None, (192, 64), (64, 64), False),
    (64, 4, 12, None, (2048, 1792), (128, 128), True),  # more pairs than a round of the second kernel has
    (45, 4, 5, None, (512, 256), (128, 64), True),
    (2, 16, 17, None, (384, 1152), (64, 32), True),  # a row alone: as many experts as its kernels take
    (2, 17, 18, None, (384, 1152), (128, 128), False),  # and one more
]
MANY = [
    (200, 2, 5, 3, (96, 160), (32, 32), True),
    (333, 4, 8, None, (2048, 1792), (128, 128), True),
    (100, 3, 3, None, (192, 320), (64, 64), False),
    (1, 4, 8, None, (256, 128), (128, 128), True),
]


def run_poisoned(mixture: Mixture, variant: int = 0) -> torch.Tensor:
    poison(*mixture.x.shape, dtype=mixture.x.dtype)
    poison(mixture.experts.numel(), mixture.down.exact.shape[2], dtype=mixture.x.dtype)
    return mixture.run(variant)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_few_rows(shape: tuple, dtype: torch.dtype) -> None:  # type: ignore[type-arg]
    rows, top_k, count, used, sizes, groups, zeros = shape
    rng = generator(rows, top_k, *sizes, DTYPES.index(dtype))
    residual = top_k % 2 == 0
    mixture = make_mixture(
        GPU, rng, rows, top_k, count, sizes, groups, dtype, zeros=zeros, used=used, residual=residual
    )
    full = run_poisoned(mixture)
    check_experts(mixture, full, VARIANTS[0])
    for m in range(1, rows, 1 if rows <= 16 else 7):
        for part in (slice(0, m), slice(m, m + 1)):
            check_rows(mixture.rows(part), run_poisoned(mixture.rows(part)), full[part], VARIANTS[0])


@pytest.mark.parametrize("variant", range(len(VARIANTS)), ids=lambda i: VARIANTS[i].name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MANY, ids=str)
def test_many_rows(shape: tuple, dtype: torch.dtype, variant: int) -> None:  # type: ignore[type-arg]
    if VARIANTS[variant].instruction == "wgmma" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma is for compute capability 9.0")
    rows, top_k, count, used, sizes, groups, zeros = shape
    rng = generator(rows, top_k, *sizes, DTYPES.index(dtype))
    residual = rows % 2 == 0
    mixture = make_mixture(
        GPU, rng, rows, top_k, count, sizes, groups, dtype, zeros=zeros, used=used, residual=residual
    )
    full = run_poisoned(mixture, variant)
    some = [0, rows // 2, rows - 1] if rows > 3 else [0]
    check_experts(mixture.rows(some), full[some], VARIANTS[variant])
    again = run_poisoned(mixture, variant)
    assert torch.equal(full, again)
    small = run_poisoned(mixture)  # all rows, by the kernel for a few: both round to 16 bits on the way
    torch.testing.assert_close(full.float(), small.float(), rtol=0.05, atol=0.02 * float(small.float().abs().max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "hidden", "count", "top_k", "biased"),
    [
        (1, 2048, 32, 4, True),
        (17, 2048, 32, 4, True),
        (300, 96, 70, 8, True),
        (9, 4096, 256, 6, False),
        (5, 32, 3, 3, True),
    ],
)
def test_the_router(rows: int, hidden: int, count: int, top_k: int, biased: bool, dtype: torch.dtype) -> None:
    rng = generator(rows, hidden, count, DTYPES.index(dtype))
    x, weight = randn(rng, rows, hidden, dtype=dtype), randn(rng, count, hidden) / hidden**0.5
    weight, bias = weight.to(dtype), randn(rng, count) / 4 if biased else None
    poison(rows, count, dtype=dtype)
    got = moe_router(x, weight, bias, top_k, True, 1.5)
    check_router(x, weight, bias, top_k, True, 1.5, got)
    for row in (0, rows // 2, rows - 1):
        alone = moe_router(x[row : row + 1].clone(), weight, bias, top_k, True, 1.5)
        for one, all_rows in zip(alone, got, strict=True):
            assert torch.equal(one[0], all_rows[row])
    reference = moe_router_reference(x, weight, bias, top_k, True, 1.5, None, 0.0)
    same = (reference[0] == got[0]).all(-1)  # where no logit rounds the other way
    assert torch.equal(reference[2][same], got[2][same])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "hidden", "count", "top_k"), [(1, 2048, 32, 4), (64, 2048, 32, 4), (300, 96, 70, 8), (9, 4128, 33, 6)]
)
def test_the_router_behind_a_norm(rows: int, hidden: int, count: int, top_k: int, dtype: torch.dtype) -> None:
    rng = generator(rows, hidden, count, DTYPES.index(dtype))
    x, weight = 3 * randn(rng, rows, hidden, dtype=dtype), randn(rng, count, hidden) / hidden**0.5
    weight, norm, bias = weight.to(dtype), 1 + randn(rng, hidden, dtype=dtype) / 4, randn(rng, count) / 4
    router = weight, bias, top_k, True, 1.5
    poison(rows, hidden, dtype=dtype)
    normalized, shares, experts = moe_norm_router(x, norm, 1e-5, *router)
    check_norm(x, norm, 1e-5, normalized)
    _, expected_shares, expected = moe_router(normalized, *router)
    assert torch.equal(experts, expected)
    assert torch.equal(shares, expected_shares)
    for row in (0, rows - 1):
        alone = moe_norm_router(x[row : row + 1].clone(), norm, 1e-5, *router)
        for one, all_rows in zip(alone, (normalized, shares, experts), strict=True):
            assert torch.equal(one[0], all_rows[row])


@pytest.mark.parametrize(
    ("rows", "variant", "sizes", "groups"),
    [
        (1, 0, (512, 256), (128, 128)),  # a CTA's warps divide K
        (5, 0, (512, 256), (128, 64)),  # a warp has slots of its own
        (40, 0, (256, 256), (128, 128)),  # more pairs than a round of the second kernel has
        (9, 0, (96, 160), (32, 32)),  # any K
        *((20, variant, (96, 160), (32, 32)) for variant in range(1, len(VARIANTS))),
    ],
    ids=str,
)
def test_sanitize_every_form(rows: int, variant: int, sizes: tuple[int, int], groups: tuple[int, int]) -> None:
    """Small, for ``compute-sanitizer``: a layer as a decode step runs it, twice, so that kernels overlap."""
    if not runs_here(variant):
        pytest.skip("wgmma is for compute capability 9.0")
    rng = generator(rows, variant, *sizes)
    mixture = make_mixture(GPU, rng, rows, 2, 5, sizes, groups, torch.bfloat16, residual=True)
    weight, norm = randn(rng, 5, sizes[0], dtype=torch.bfloat16) / 16, randn(rng, sizes[0], dtype=torch.bfloat16)

    def layer() -> tuple[torch.Tensor, ...]:
        normalized, shares, experts = moe_norm_router(mixture.x, norm, 1e-5, weight, None, 2, True, 1.0)
        sent = dataclasses.replace(mixture, x=normalized, shares=shares, experts=experts)
        return normalized, shares, experts, sent.run(variant)

    first, second = layer(), layer()
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    normalized, shares, experts, y = first
    sent = dataclasses.replace(mixture, x=normalized, shares=shares, experts=experts)
    check_experts(sent, y, VARIANTS[variant])


def test_of_equal_scores_the_first_expert_is_taken() -> None:
    x, weight = torch.zeros(2, 64, dtype=torch.bfloat16, device="cuda"), torch.randn(40, 64, device="cuda").bfloat16()
    x[1, 3] = 1
    weight[:, 3], weight[7, 3], weight[30, 3] = 0, float("nan"), 1
    _, _, experts = moe_router(x, weight, None, 3, True, 1.0)
    assert experts.tolist() == [[7, 0, 1], [7, 30, 0]]


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_a_captured_graph_goes_where_its_inputs_say(rows: int) -> None:
    rng = generator(rows)
    mixture = make_mixture(GPU, rng, rows, 2, 6, (256, 128), (128, 128), torch.bfloat16)
    weight, bias = randn(rng, 6, 256, dtype=torch.bfloat16) / 16, randn(rng, 6) / 8
    norm = randn(rng, 256, dtype=torch.bfloat16)
    up, down = mixture.gate_up, mixture.down
    for variant in range(len(VARIANTS)):
        if not runs_here(variant):
            continue

        def layer(x: torch.Tensor, variant: int = variant) -> torch.Tensor:
            normalized, shares, experts = moe_norm_router(x, norm, 1e-5, weight, bias, 2, True, 1.0)
            packed = (up.qweight, up.scales, up.zeros, down.qweight, down.scales, down.zeros)
            return moe_experts(normalized, experts, shares, *packed, 128, 128, 128, variant, x)

        x = mixture.x.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(x)
        for seed in range(3):
            x.copy_(randn(generator(seed), rows, 256, dtype=torch.bfloat16))
            out.fill_(float("nan"))
            graph.replay()
            assert torch.equal(out, layer(x.clone()))


def runs_here(variant: int) -> bool:
    return VARIANTS[variant].instruction == "mma" or torch.cuda.get_device_capability() == (9, 0)


def test_near_the_reference() -> None:
    mixture = make_mixture(GPU, generator(5), 16, 4, 8, (512, 256), (128, 128), torch.bfloat16)
    up, down = mixture.gate_up, mixture.down
    packed = (up.qweight, up.scales, up.zeros, down.qweight, down.scales, down.zeros, 256, 128, 128, 0, None)
    expected = moe_experts_reference(mixture.x, mixture.experts, mixture.shares, *packed).float()
    # Weights, gate, up, silu, their product and the sum are each rounded to 8 bits: six half steps of a row's largest.
    error = (mixture.run().float() - expected).abs().amax() / expected.abs().amax()
    assert float(error) <= 6 * 2.0**-9


def test_bad_arguments_are_refused_in_words() -> None:
    mixture = make_mixture(GPU, generator(2), 3, 2, 4, (64, 32), (64, 32), torch.float16)
    up, down = mixture.gate_up, mixture.down
    packed = [up.qweight, up.scales, up.zeros, down.qweight, down.scales, down.zeros, 32, 64, 32, 0, None]
    arguments = [mixture.x, mixture.experts, mixture.shares, *packed]
    cases: list[tuple[str, int, object]] = [
        ("x must be contiguous", 0, shifted(mixture.x, offset=8)),
        ("x must be aligned to 16 bytes", 0, torch.zeros(3 * 64 + 1, device="cuda").half()[1:].view(3, 64)),
        ("experts must be int64", 1, mixture.experts.int()),
        (r"shares must have shape \(M, K\)", 2, mixture.shares[:, :1]),
        ("gate_up_qweight must have shape", 3, up.qweight[:, 1:]),
        ("gate_up_scales and x must have the same dtype", 4, up.scales.bfloat16()),
        ("down_zeros must be uint8", 8, down.zeros.int() if down.zeros is not None else None),
        ("intermediate_size must be a positive multiple of 32, got 16", 9, 16),
        ("gate_up_group_size must be 32, 64 or 128, got 16", 10, 16),
        ("variant must be in 0 to", 12, len(VARIANTS)),
        (r"residual must have shape \(M, H\)", 13, mixture.x[:2]),
        ("residual and x must have the same dtype", 13, mixture.x.bfloat16()),
    ]
    for message, place, value in cases:
        with pytest.raises(RuntimeError, match=message):
            moe_experts(*(value if i == place else argument for i, argument in enumerate(arguments)))
    weight = torch.zeros(300, 64, device="cuda").half()
    for message, call in (
        ("takes up to 256 experts, got 300", (mixture.x, weight, None, 2, True, 1.0)),
        ("top_k must be in 1 to 4", (mixture.x, weight[:4], None, 5, True, 1.0)),
        ("norm_weight must have shape", (mixture.x, weight[:4], None, 2, True, 1.0, weight[0, :32], 1e-5)),
        ("expert_bias must be float32", (mixture.x, weight[:4], weight[0, :4].clone(), 2, True, 1.0)),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.hf_fastpath.moe_router(*(call if len(call) == 8 else (*call, None, 0.0)))
