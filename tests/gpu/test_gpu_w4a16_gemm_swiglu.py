"""SwiGLU of the int4 product of many rows on the GPU: the bits of the product and SwiGLU apart."""

from __future__ import annotations

import pytest
import torch
from gpu_common import DEVICE, make_weight, poison, randn
from kernel_cases import DTYPES, Weight, generator, shifted

from hf_fastpath.heuristics import w4a16_gemm_runs_on, w4a16_gemm_swiglu_has
from hf_fastpath.modules.merged import Int4Weight, Norm
from hf_fastpath.ops import rms_norm, swiglu, w4a16_gemm_swiglu
from hf_fastpath.ops.w4a16_gemm import VARIANTS

pytestmark = pytest.mark.gpu

WITH_KERNEL = [i for i in range(len(VARIANTS)) if w4a16_gemm_swiglu_has(i)]
ALL_VARIANTS = pytest.mark.parametrize("variant", WITH_KERNEL, ids=lambda i: f"variant{i}")
SHAPES = [  # (M, I, K, group): odd rows, I beside multiples of 64, tails of K, many tiles, K of many units
    (1, 16, 32, 32),
    (17, 48, 96, 32),
    (65, 80, 288, 32),
    (33, 144, 192, 64),
    (130, 496, 448, 64),
    (64, 112, 128, 128),
    (21, 32, 11520, 128),
    (47, 5632, 2048, 128),
    (64, 14336, 4096, 128),
    (63, 9008, 256, 64),
]


@pytest.fixture(autouse=True)
def _can_run(request: pytest.FixtureRequest) -> None:
    variant = request.node.callspec.params.get("variant") if hasattr(request.node, "callspec") else None
    if variant is not None and not w4a16_gemm_runs_on(variant, torch.cuda.get_device_capability()):
        pytest.skip(f"{VARIANTS[variant]} is not for this GPU")


def apart(weight: Weight, x: torch.Tensor, variant: int, bias: torch.Tensor | None = None) -> torch.Tensor:
    return swiglu(weight.gemm(x, variant, bias))


@ALL_VARIANTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_zeros", [False, True], ids=["symmetric", "zeros"])
@pytest.mark.parametrize(("m", "half", "k", "group"), SHAPES)
def test_the_bits_of_the_product_and_swiglu(
    m: int, half: int, k: int, group: int, with_zeros: bool, dtype: torch.dtype, variant: int
) -> None:
    rng = generator(m, half, k, group, with_zeros, DTYPES.index(dtype))
    weight = make_weight(rng, 2 * half, k, group, dtype, with_zeros=with_zeros)
    bias = randn(rng, 2 * half, dtype=dtype) if with_zeros else None
    x = randn(rng, m, k, dtype=dtype)
    expected = apart(weight, x, variant, bias)
    poison(m, half, dtype=dtype)
    out = weight.gemm_swiglu(x, variant, bias)
    assert out.shape == (m, half)
    assert torch.equal(out, expected)
    for _ in range(5):
        assert torch.equal(weight.gemm_swiglu(x, variant, bias), expected)


@ALL_VARIANTS
@pytest.mark.parametrize("m", range(17, 65, 3))
def test_every_number_of_rows(m: int, variant: int) -> None:
    rng = generator(m)
    weight = make_weight(rng, 2 * 1040, 512, 128, torch.bfloat16)
    x = randn(rng, m, 512, dtype=torch.bfloat16)
    expected = apart(weight, x, variant)
    poison(m, 1040, dtype=torch.bfloat16)
    assert torch.equal(weight.gemm_swiglu(x, variant), expected)


@ALL_VARIANTS
def test_shifted_views_give_the_same_bits(variant: int) -> None:
    rng = generator(5)
    weight = make_weight(rng, 2 * 112, 576, 64, torch.bfloat16)
    x = randn(rng, 61, 576, dtype=torch.bfloat16)
    expected = weight.gemm_swiglu(x, variant)
    for offset, extra in ((1, 3), (8, 8), (4, 8), (8, 1)):
        assert torch.equal(weight.gemm_swiglu(shifted(x, offset=offset, extra=extra), variant), expected)


@ALL_VARIANTS
def test_between_the_kernels_of_a_layer(variant: int) -> None:
    """x is read after the kernel before has stored it, and the next kernel reads what this one has, however early each
    begins."""
    rng = generator(6)
    gate_up = make_weight(rng, 2 * 2048, 1024, 128, torch.bfloat16)
    down = make_weight(rng, 1024, 2048, 128, torch.bfloat16)
    x, weight = randn(rng, 64, 1024, dtype=torch.bfloat16), randn(rng, 1024, dtype=torch.bfloat16)

    def layer(rows: torch.Tensor, fused: bool) -> torch.Tensor:
        normalized = rms_norm(rows, weight, 1e-5)
        inner = gate_up.gemm_swiglu(normalized, variant) if fused else apart(gate_up, normalized, variant)
        return down.gemm(inner, variant, None, rows)

    expected = layer(layer(x, False), False)
    for _ in range(20):
        assert torch.equal(layer(layer(x, True), True), expected)


@ALL_VARIANTS
def test_a_captured_graph_replays_with_new_inputs(variant: int) -> None:
    rng = generator(8)
    weight = make_weight(rng, 2 * 1024, 2048, 128, torch.float16)
    x = randn(rng, 40, 2048, dtype=torch.float16)
    weight.gemm_swiglu(x, variant)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = weight.gemm_swiglu(x, variant)
    for seed in range(3):
        x.copy_(randn(generator(seed), 40, 2048, dtype=torch.float16))
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, weight.gemm_swiglu(x, variant))


@pytest.mark.parametrize("rows", [5, 16, 17, 40, 64, 65, 300])
def test_a_merged_weight_gives_what_its_parts_give(rows: int) -> None:
    """Whichever kernels run: the product of more than 16 rows and SwiGLU have the bits of two operations."""
    rng = generator(rows)
    weight = make_weight(rng, 2 * 2048, 1024, 128, torch.bfloat16)
    merged = Int4Weight(weight.qweight, weight.scales, None, None, 4096, 128)
    x, norm = randn(rng, rows, 1024, dtype=torch.bfloat16), Norm(randn(rng, 1024, dtype=torch.bfloat16), 1e-5)
    out = merged.swiglu(x, norm)
    assert torch.equal(out, merged.swiglu(rms_norm(x, *norm), None))
    expected = swiglu(merged.product(x, norm, None))
    if rows > 16:
        assert torch.equal(out, expected)
    else:  # the product adds in another order: gate and up are rounded, silu of one and the result
        assert float((out - expected).float().norm() / expected.float().norm()) < 4 * 2.0**-8


def test_no_rows_and_opcheck() -> None:
    weight = make_weight(generator(10), 64, 128, 32, torch.float16)
    variant = WITH_KERNEL[0]
    assert weight.gemm_swiglu(torch.empty(0, 128, dtype=torch.float16, device=DEVICE), variant).shape == (0, 32)
    if not w4a16_gemm_runs_on(variant, torch.cuda.get_device_capability()):
        pytest.skip("no variant is for this GPU")
    x = randn(generator(11), 20, 128, dtype=torch.float16)
    op = torch.ops.hf_fastpath.w4a16_gemm_swiglu.default
    args = (x, weight.qweight, weight.scales, None, None, 32, 32, variant)
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_bad_arguments_are_refused_in_words() -> None:
    weight = make_weight(generator(14), 64, 128, 32, torch.float16)
    x = randn(generator(15), 20, 128, dtype=torch.float16)
    packed = (weight.qweight, weight.scales, None)
    cases: list[tuple[str, tuple[object, ...]]] = [
        (f"variant must be in 0 to {len(VARIANTS) - 1}, got -1", (x, *packed, None, 32, 32, -1)),
        *(
            (f"variant {i} is none with wgmma", (x, *packed, None, 32, 32, i))
            for i in range(len(VARIANTS))
            if i not in WITH_KERNEL
        ),
        ("positive multiple of 16, got 20", (x, *packed, None, 20, 32, WITH_KERNEL[0])),
        ("qweight must have shape", (x, *packed, None, 48, 32, WITH_KERNEL[0])),
        ("bias must have shape", (x, *packed, x[0, :32], 32, 32, WITH_KERNEL[0])),
        ("x and scales must have the same dtype", (x.bfloat16(), *packed, None, 32, 32, WITH_KERNEL[0])),
    ]
    for message, args in cases:
        with pytest.raises(RuntimeError, match=message):
            w4a16_gemm_swiglu(*args)  # type: ignore[arg-type]
