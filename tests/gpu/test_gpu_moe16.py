"""A mixture of 16-bit experts on the GPU, against float64."""

from __future__ import annotations

import pytest
import torch
from gpu_common import GPU, poison, randn
from kernel_cases import DTYPES, generator, shifted
from moe16_cases import Mixture, check_experts, make_mixture

from hf_fastpath.modules import Experts16
from hf_fastpath.modules.experts16 import grouped_experts
from hf_fastpath.ops import moe_experts_16bit
from hf_fastpath.ops.moe_experts_16bit import moe_experts_16bit_reference

pytestmark = pytest.mark.gpu

SHAPES = [  # rows, top_k, experts, experts in use, hidden and intermediate
    (16, 4, 9, None, (2048, 1792)),
    (16, 2, 4, 2, (1152, 32)),  # all rows on the same two experts
    (16, 3, 5, 4, (96, 160)),
    (16, 1, 7, None, (32, 2208)),  # a K of which not all is held in registers
    (16, 8, 9, None, (2080, 224)),
]


def run_poisoned(mixture: Mixture) -> torch.Tensor:
    poison(*mixture.x.shape, dtype=mixture.x.dtype)
    poison(mixture.experts.numel(), mixture.down.shape[2], dtype=mixture.x.dtype)
    return mixture.run()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_few_rows(shape: tuple, dtype: torch.dtype) -> None:  # type: ignore[type-arg]
    rows, top_k, count, used, sizes = shape
    rng = generator(rows, top_k, *sizes, DTYPES.index(dtype))
    mixture = make_mixture(GPU, rng, rows, top_k, count, sizes, dtype, used=used, residual=dtype == torch.float16)
    full = run_poisoned(mixture)
    check_experts(mixture, full)
    for m in range(1, rows):
        assert torch.equal(run_poisoned(mixture.rows(slice(0, m))), full[:m])
        assert torch.equal(run_poisoned(mixture.rows(slice(m, m + 1))), full[m : m + 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [17, 33, 64, 150])
def test_more_rows(rows: int, dtype: torch.dtype) -> None:
    """64 rows of four experts are what a launch takes; 150 are three launches."""
    mixture = make_mixture(GPU, generator(rows), rows, 4, 9, (256, 160), dtype, residual=True)
    full = run_poisoned(mixture)
    check_experts(mixture, full)
    assert torch.equal(run_poisoned(mixture), full)
    some = [0, rows // 2, rows - 1]
    assert torch.equal(run_poisoned(mixture.rows(some)), full[some])


@pytest.mark.parametrize("rows", [1, 7, 12])
def test_sanitize(rows: int) -> None:
    """Small enough for compute-sanitizer."""
    mixture = make_mixture(GPU, generator(rows), rows, 2, 3, (96, 64), torch.bfloat16, residual=True)
    check_experts(mixture, run_poisoned(mixture))


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_a_captured_graph_goes_where_its_inputs_say(rows: int) -> None:
    mixture = make_mixture(GPU, generator(rows), rows, 2, 6, (256, 128), torch.bfloat16, residual=True)
    x, experts = mixture.x.clone(), mixture.experts.clone()

    def twice(x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """The second call may begin while the first one ends."""
        once = moe_experts_16bit(x, experts, mixture.shares, mixture.gate_up, mixture.down, mixture.residual)
        return moe_experts_16bit(once, experts, mixture.shares, mixture.gate_up, mixture.down, x)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())  # else `experts` is read before it is written
    with torch.cuda.stream(side):
        twice(x, experts)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = twice(x, experts)
    for seed in range(5):
        rng = generator(seed)
        x.copy_(randn(rng, rows, 256, dtype=torch.bfloat16))
        experts.copy_(torch.rand(rows, 6, generator=rng).topk(2).indices)
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, twice(x.clone(), experts.clone()))


@pytest.mark.parametrize("rows", [9, 300])
def test_near_the_reference_and_the_grouped_products(rows: int) -> None:
    mixture = make_mixture(GPU, generator(5), rows, 4, 8, (512, 256), torch.bfloat16)
    expected = moe_experts_16bit_reference(*mixture.arguments()).float()
    grouped = grouped_experts(mixture.x, mixture.experts, mixture.shares, mixture.gate_up, mixture.down)
    # gate, up, silu, their product, the experts' results, their products with shares and the sum are each rounded to 8
    # bits: seven half steps of a row's largest, of each of the two that are compared.
    for got in (mixture.run(), grouped):
        error = (got.float() - expected).abs().amax() / expected.abs().amax()
        assert float(error) <= 14 * 2.0**-9


def test_what_transformers_experts_become() -> None:
    lfm2 = pytest.importorskip("transformers.models.lfm2_moe")
    from hf_fastpath.patches.lfm2_moe import FastLfm2MoeExperts

    config = lfm2.Lfm2MoeConfig(hidden_size=256, moe_intermediate_size=128, num_experts=8)
    config._experts_implementation = "grouped_mm"
    experts = lfm2.modeling_lfm2_moe.Lfm2MoeExperts(config).to(torch.bfloat16).cuda()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.06)
    assert Experts16.why_not(experts) == ""
    for rows in (1, 16, 64, 65, 500):
        rng = generator(rows)
        x, shares = randn(rng, rows, 256, dtype=torch.bfloat16), randn(rng, rows, 4, dtype=torch.bfloat16).abs()
        chosen = torch.rand(rows, 8, generator=rng).topk(4).indices.cuda()
        with torch.no_grad():
            experts.__class__ = lfm2.modeling_lfm2_moe.Lfm2MoeExperts
            stock = experts(x, chosen, shares).float()
            experts.__class__ = FastLfm2MoeExperts
            got, added = experts(x, chosen, shares), experts(x, chosen, shares, residual=x)
        scale = float(stock.abs().amax())
        assert float((got.float() - stock).abs().amax()) <= 14 * 2.0**-9 * scale
        assert float((added.float() - x.float() - stock).abs().amax()) <= 16 * 2.0**-9 * (scale + float(x.abs().amax()))


def test_bad_arguments_are_refused_in_words() -> None:
    mixture = make_mixture(GPU, generator(2), 3, 2, 4, (64, 32), torch.float16, residual=True)
    arguments = list(mixture.arguments())
    cases: list[tuple[str, int, object]] = [
        ("x must be contiguous", 0, shifted(mixture.x, offset=8)),
        ("x must be aligned to 16 bytes", 0, torch.zeros(3 * 64 + 1, device="cuda").half()[1:].view(3, 64)),
        ("x must be float16 or bfloat16", 0, mixture.x.float()),
        ("experts must be int64", 1, mixture.experts.int()),
        (r"shares must have shape \(M, K\)", 2, mixture.shares[:, :1]),
        ("shares and x must have the same dtype", 2, mixture.shares.float()),
        (r"gate_up must have shape \(E, 2 I, H\)", 3, mixture.gate_up[:, 1:]),
        ("gate_up must be contiguous", 3, mixture.gate_up.mT.contiguous().mT),
        (r"down must have shape \(E, H, I\)", 4, mixture.down[:, 1:]),
        ("I must be a positive multiple of 32, got 16", 4, mixture.down[:, :, :16]),
        (r"residual must have shape \(M, H\)", 5, mixture.x[:2]),
        ("residual must be on cuda:0", 5, mixture.x.cpu()),
    ]
    for message, place, value in cases:
        with pytest.raises((RuntimeError, NotImplementedError), match=message):
            moe_experts_16bit(*(value if i == place else argument for i, argument in enumerate(arguments)))
