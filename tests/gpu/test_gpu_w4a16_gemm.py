"""The int4 product of many rows on the GPU: every variant that it can run, against float64."""

from __future__ import annotations

import pytest
import torch
from gpu_common import DEVICE, make_weight, poison, randn
from kernel_cases import DTYPES, check_gemm, generator, shifted, with_far_scales

from hf_fastpath.heuristics import w4a16_gemm_runs_on
from hf_fastpath.ops import w4a16_gemm
from hf_fastpath.ops.w4a16_gemm import VARIANTS

pytestmark = pytest.mark.gpu

ALL_VARIANTS = pytest.mark.parametrize("variant", range(len(VARIANTS)), ids=lambda i: f"variant{i}")
SHAPES = [  # (M, N, K, group): odd N, tails of K, one tile and many, K of many units
    (1, 1, 32, 32),
    (17, 33, 96, 32),
    (65, 150, 288, 32),
    (33, 300, 192, 64),
    (130, 1000, 448, 64),
    (64, 272, 128, 128),
    (20, 40, 11520, 128),
    (128, 6144, 4096, 128),
    (700, 2048, 2048, 128),
    (33, 9000, 256, 128),
]


@pytest.fixture(autouse=True)
def _can_run(request: pytest.FixtureRequest) -> None:
    variant = request.node.callspec.params.get("variant") if hasattr(request.node, "callspec") else None
    if variant is not None and not w4a16_gemm_runs_on(variant, torch.cuda.get_device_capability()):
        pytest.skip(f"{VARIANTS[variant]} is not for this GPU")


@ALL_VARIANTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_zeros", [False, True], ids=["symmetric", "zeros"])
@pytest.mark.parametrize(("m", "n", "k", "group"), SHAPES)
def test_shapes(m: int, n: int, k: int, group: int, with_zeros: bool, dtype: torch.dtype, variant: int) -> None:
    rng = generator(m, n, k, group, with_zeros, DTYPES.index(dtype))
    weight = make_weight(rng, n, k, group, dtype, with_zeros=with_zeros)
    bias = randn(rng, n, dtype=dtype) if with_zeros else None
    x = randn(rng, m, k, dtype=dtype)
    poison(m, n, dtype=dtype)
    out = weight.gemm(x, variant, bias)
    assert out.shape == (m, n)
    check_gemm(x, weight, bias, out, VARIANTS[variant])


@ALL_VARIANTS
@pytest.mark.parametrize(("n", "k", "group"), [(100, 288, 32), (100, 576, 64), (48, 1024, 128)])
def test_shifted_views_give_the_same_bits(n: int, k: int, group: int, variant: int) -> None:
    rng = generator(n, k)
    weight = make_weight(rng, n, k, group, torch.bfloat16)
    x = randn(rng, 75, k, dtype=torch.bfloat16)
    expected = weight.gemm(x, variant)
    for offset, extra in ((1, 3), (8, 8), (4, 8), (8, 1)):
        assert torch.equal(weight.gemm(shifted(x, offset=offset, extra=extra), variant), expected), (offset, extra)


@ALL_VARIANTS
@pytest.mark.parametrize(("m", "n", "k", "group"), [(65, 333, 288, 32), (64, 4096, 2048, 128), (300, 2048, 512, 128)])
def test_a_residual_is_added_before_rounding(m: int, n: int, k: int, group: int, variant: int) -> None:
    rng = generator(m, n, k)
    weight = make_weight(rng, n, k, group, torch.bfloat16, with_zeros=True)
    x, bias = randn(rng, m, k, dtype=torch.bfloat16), randn(rng, n, dtype=torch.bfloat16)
    residual = 8 * randn(rng, m, n, dtype=torch.bfloat16)
    poison(m, n, dtype=torch.bfloat16)
    out = weight.gemm(x, variant, bias, residual)
    check_gemm(x, weight, bias, out, VARIANTS[variant], residual)
    assert not torch.equal(out, weight.gemm(x, variant, bias) + residual)


@ALL_VARIANTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_zeros", [False, True], ids=["symmetric", "zeros"])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_weights_are_those_of_dequantize(group: int, with_zeros: bool, dtype: torch.dtype, variant: int) -> None:
    """Bit by bit: rows of x that pick a column each. Every nibble meets every row of a packed tile."""
    rng = generator(group, with_zeros)
    weight = make_weight(rng, 272, 256, group, dtype, with_zeros=with_zeros)
    weight = with_far_scales(weight, rng)
    columns = torch.eye(256, dtype=dtype, device=DEVICE)
    assert torch.equal(weight.gemm(columns, variant).T, weight.dequantize())


@ALL_VARIANTS
def test_a_product_of_the_kernel_before(variant: int) -> None:
    """x and the residual are read after the kernel before has stored them, however early this one begins."""
    rng = generator(16)
    weight = make_weight(rng, 2048, 2048, 128, torch.bfloat16)
    x = randn(rng, 64, 2048, dtype=torch.bfloat16) / 8
    first = weight.gemm(x, variant)
    expected = weight.gemm(first, variant, None, first)
    for _ in range(20):
        chained = weight.gemm(x, variant)
        assert torch.equal(weight.gemm(chained, variant, None, chained), expected)


@ALL_VARIANTS
@pytest.mark.parametrize("m", [64, 1024])
def test_the_same_bits_every_time(m: int, variant: int) -> None:
    rng = generator(6)
    weight = make_weight(rng, 6144, 4096, 128, torch.bfloat16)
    x = randn(rng, m, 4096, dtype=torch.bfloat16)
    first = weight.gemm(x, variant)
    check_gemm(x, weight, None, first, VARIANTS[variant])
    for _ in range(20):
        assert torch.equal(weight.gemm(x, variant), first)


@ALL_VARIANTS
def test_calls_on_two_streams_at_once(variant: int) -> None:
    """A call's workspace is its own."""
    rng = generator(7)
    weight = make_weight(rng, 2048, 2048, 128, torch.bfloat16)
    xs = [randn(rng, 64, 2048, dtype=torch.bfloat16) for _ in range(2)]
    expected = [weight.gemm(x, variant) for x in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    for _ in range(20):
        results = []
        for stream, x in zip(streams, xs, strict=True):
            with torch.cuda.stream(stream):
                results.append(weight.gemm(x, variant))
        torch.cuda.synchronize()
        assert all(torch.equal(got, want) for got, want in zip(results, expected, strict=True))


@ALL_VARIANTS
def test_a_captured_graph_replays_with_new_inputs(variant: int) -> None:
    rng = generator(8)
    weight = make_weight(rng, 2048, 2048, 128, torch.float16)
    x = randn(rng, 40, 2048, dtype=torch.float16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        weight.gemm(x, variant)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = weight.gemm(x, variant)
    for seed in range(3):
        x.copy_(randn(generator(seed), 40, 2048, dtype=torch.float16))
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, weight.gemm(x, variant))


@ALL_VARIANTS
def test_rows_are_kept_apart(variant: int) -> None:
    rng = generator(9)
    weight = make_weight(rng, 64, 512, 128, torch.float16)
    x = randn(rng, 40, 512, dtype=torch.float16)
    expected = weight.gemm(x, variant)
    x[3, 5], x[37, 100] = float("nan"), float("inf")
    out = weight.gemm(x, variant)
    others = [row for row in range(40) if row not in (3, 37)]
    assert torch.equal(out[others], expected[others])
    assert out[3].isnan().all()


@ALL_VARIANTS
def test_no_rows(variant: int) -> None:
    weight = make_weight(generator(10), 20, 64, 64, torch.float16)
    assert weight.gemm(torch.empty(0, 64, dtype=torch.float16, device=DEVICE), variant).shape == (0, 20)


@ALL_VARIANTS
def test_the_comparison_sees_one_flipped_nibble(variant: int) -> None:
    rng = generator(11)
    weight = make_weight(rng, 32, 96, 32, torch.bfloat16)
    x = randn(rng, 20, 96, dtype=torch.bfloat16)
    weight.qweight.view(-1)[77] ^= 8 << 12
    with pytest.raises(AssertionError, match="beyond their bound"):
        check_gemm(x, weight, None, weight.gemm(x, variant), VARIANTS[variant])


def test_opcheck() -> None:
    weight = make_weight(generator(12), 40, 128, 32, torch.float16)
    x = randn(generator(13), 20, 128, dtype=torch.float16)
    args = (x, weight.qweight, weight.scales, None, None, 40, 32, 0, None)
    op = torch.ops.hf_fastpath.w4a16_gemm.default
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_bad_arguments_are_refused_in_words() -> None:
    weight = make_weight(generator(14), 40, 128, 32, torch.float16, with_zeros=True)
    x = randn(generator(15), 20, 128, dtype=torch.float16)
    q, scales, zeros = weight.qweight, weight.scales, weight.zeros
    assert zeros is not None
    moved_scales = torch.cat([scales.flatten()[:2], scales.flatten()])[2:].view(scales.shape)
    cases: list[tuple[str, tuple[object, ...]]] = [
        (f"variant must be in 0 to {len(VARIANTS) - 1}, got -1", (x, q, scales, zeros, None, 40, 32, -1)),
        (f"got {len(VARIANTS)}", (x, q, scales, zeros, None, 40, 32, len(VARIANTS))),
        ("x must have shape", (x[0], q, scales, zeros, None, 40, 32, 0)),
        ("contiguous in its last dimension", (x.T.contiguous().T, q, scales, zeros, None, 40, 32, 0)),
        ("x and scales must have the same dtype", (x.bfloat16(), q, scales, zeros, None, 40, 32, 0)),
        ("scales must be aligned to 16 bytes", (x, q, moved_scales, zeros, None, 40, 32, 0)),
        ("qweight must have shape", (x, q, scales, zeros, None, 100, 32, 0)),
        ("bias must have shape", (x, q, scales, zeros, x[0], 40, 32, 0)),
        ("scales must be on cuda:0", (x, q, scales.cpu(), zeros, None, 40, 32, 0)),
        ("residual must have shape", (x, q, scales, zeros, None, 40, 32, 0, x)),
        ("residual must be contiguous", (x, q, scales, zeros, None, 40, 32, 0, x[:, :40])),
    ]
    for message, args in cases:
        with pytest.raises(RuntimeError, match=message):
            w4a16_gemm(*args)  # type: ignore[arg-type]
