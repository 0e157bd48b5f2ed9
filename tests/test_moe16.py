"""Mixtures of 16-bit experts: reference against float64, every way of computing, what transformers' modules become."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import DTYPES, Target, generator
from moe16_cases import Mixture, check_experts, make_mixture
from tiny_models import logits, make_lfm2_moe
from transformers.models.lfm2_moe.modeling_lfm2_moe import Lfm2MoeExperts

from hf_fastpath import fastpath_report, ops, patch_model, unpatch_model
from hf_fastpath.heuristics import MOE_FEW_ROWS, Experts16Variant, experts16_variant
from hf_fastpath.modules import Experts16
from hf_fastpath.modules.experts16 import grouped_experts
from hf_fastpath.patches.lfm2_moe import FastLfm2MoeExperts

CPU = Target("cpu", ops)
EXPERTS = "model.layers.1.feed_forward.experts"


def largest_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(
    ("rows", "top_k", "count", "sizes"), [(1, 4, 5, (64, 32)), (9, 2, 3, (96, 160)), (33, 3, 7, (40, 24))]
)
def test_the_reference_computes_its_formula(
    rows: int, top_k: int, count: int, sizes: tuple[int, int], residual: bool, dtype: torch.dtype
) -> None:
    rng = generator(rows, top_k, DTYPES.index(dtype))
    mixture = make_mixture(CPU, rng, rows, top_k, count, sizes, dtype, used=max(top_k, count - 1), residual=residual)
    mixture.gate_up[count - 1 :] = float("nan")  # what is not chosen is not read
    mixture.down[count - 1 :] = float("nan")
    check_experts(mixture, mixture.run())


def of_module(mixture: Mixture) -> Lfm2MoeExperts:
    """transformers' experts with a mixture's weights."""
    count, hidden, inner = mixture.down.shape
    sizes = {"hidden_size": hidden, "moe_intermediate_size": inner, "num_experts": count}
    experts = make_lfm2_moe(mixture.x.dtype, **sizes).get_submodule(EXPERTS)
    assert isinstance(experts, Lfm2MoeExperts)
    experts.gate_up_proj.data, experts.down_proj.data = mixture.gate_up, mixture.down
    return experts


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 20])
@torch.no_grad()
def test_every_way_of_computing_gives_the_same(rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = make_mixture(CPU, generator(rows), rows, 2, 5, (64, 32), dtype, used=4, residual=True)
    experts, inputs, residual = of_module(mixture), mixture.arguments()[:3], mixture.residual
    stock = experts(*inputs)
    assert Experts16.why_not(experts) == ""
    experts.__class__ = FastLfm2MoeExperts
    assert torch.equal(experts(*inputs), stock)  # the CPU has transformers' bits
    assert torch.equal(experts(*inputs, residual=residual), residual + stock)
    for variant in (Experts16Variant.OP, Experts16Variant.GROUPED):
        monkeypatch.setattr(Experts16, "_variant", lambda *_, variant=variant: variant)
        # gate, up, silu(gate), their product, the expert's result, its product with the share and the sum are each
        # rounded, to half steps of 2^-8 or 2^-11, and two of them compared: no more than 2 * 7 half steps.
        unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
        assert largest_error(experts(*inputs), stock) <= 7 * unit
        assert largest_error(experts(*inputs, residual=residual), residual + stock) <= 7 * unit
    if variant is Experts16Variant.GROUPED:
        assert torch.equal(experts(*inputs), grouped_experts(*inputs, mixture.gate_up, mixture.down))


def test_gradients_and_other_dtypes_are_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Experts16, "_variant", lambda *_: pytest.fail("asked for a variant"))
    mixture = make_mixture(CPU, generator(2), 3, 2, 4, (64, 32), torch.bfloat16)
    experts = of_module(mixture)
    experts.__class__ = FastLfm2MoeExperts
    leaf = mixture.x.clone().requires_grad_()
    experts(leaf, mixture.experts, mixture.shares).sum().backward()
    assert float(leaf.grad.abs().max()) > 0
    with torch.no_grad():
        assert experts(mixture.x, mixture.experts, mixture.shares.float()).isfinite().all()


def test_which_variant_is_taken() -> None:
    for rows in (1, 1000):
        assert experts16_variant("cpu", rows, torch.bfloat16) is Experts16Variant.TRANSFORMERS
    for dtype in DTYPES:
        assert experts16_variant("cuda", MOE_FEW_ROWS, dtype, (8, 0)) is Experts16Variant.OP
        assert experts16_variant("cuda", MOE_FEW_ROWS + 1, dtype, (8, 0)) is Experts16Variant.GROUPED
    # In a CUDA graph, what waits for the GPU cannot be.
    for dtype, capability, waits in (
        (torch.bfloat16, (9, 0), False),
        (torch.float16, (9, 0), True),
        (torch.bfloat16, (8, 0), True),
    ):
        variant = experts16_variant("cuda", 100, dtype, capability, True)
        assert variant is (Experts16Variant.OP if waits else Experts16Variant.GROUPED)


def in_float32(experts: Any) -> None:
    experts.float()


def transposed(experts: Any) -> None:
    experts.down_proj.data = experts.down_proj.data.mT.contiguous().mT


def narrow(experts: Any) -> None:
    experts.gate_up_proj.data = experts.gate_up_proj.data[..., :48].contiguous()


def with_gelu(experts: Any) -> None:
    experts.act_fn = torch.nn.functional.gelu


def divided(experts: Any) -> None:
    experts.num_experts = 8


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (in_float32, "not in 16 bits"),
        (transposed, "not contiguous"),
        (narrow, "not multiples of 32"),
        (with_gelu, "not SiLU"),
        (divided, "divided among GPUs"),
    ],
)
def test_why_experts_stay_as_they_are(change: Any, reason: str) -> None:
    experts = make_lfm2_moe(torch.bfloat16).get_submodule(EXPERTS)
    assert Experts16.why_not(experts) == ""
    change(experts)
    assert reason in Experts16.why_not(experts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_experts_that_are_not_packed_get_the_op(dtype: torch.dtype, prompt: torch.Tensor) -> None:
    model = patch_model(make_lfm2_moe(dtype), skip_modules=("experts",), keep_original=True, progress=False)
    experts = model.get_submodule(EXPERTS)
    assert type(experts) is (FastLfm2MoeExperts if dtype == torch.bfloat16 else Lfm2MoeExperts)
    assert ("Lfm2MoeExperts, whose weights are not in 16 bits" in str(fastpath_report(model))) == (
        dtype == torch.float32
    )
    before = logits(model, prompt)
    experts.__class__ = Lfm2MoeExperts
    assert torch.equal(logits(model, prompt), before)
    experts.__class__ = FastLfm2MoeExperts if dtype == torch.bfloat16 else Lfm2MoeExperts
    unpatch_model(model)
    assert type(experts) is Lfm2MoeExperts


def test_the_lossless_mode_keeps_transformers_experts() -> None:
    model = patch_model(make_lfm2_moe(torch.bfloat16), weights=None, kv_cache="static")
    assert type(model.get_submodule(EXPERTS)) is Lfm2MoeExperts


def test_the_op_takes_no_tokens() -> None:
    mixture = make_mixture(CPU, generator(0), 4, 2, 3, (64, 32), torch.bfloat16).rows(slice(0, 0))
    assert mixture.run().shape == (0, 64)
