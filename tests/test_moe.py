"""Mixtures of experts: router and experts against their formulas, packing, searching, what is left and named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import fingerprint, logits, make_lfm2_moe
from transformers.models.lfm2_moe.modeling_lfm2_moe import Lfm2MoeExperts, Lfm2MoeRMSNorm, Lfm2MoeTopKRouter

from hf_fastpath import FastpathConfig, Unsupported, expert_search, fastpath_report, patch_model, unpatch_model
from hf_fastpath.expert_search import ExpertInputs, quantize_experts
from hf_fastpath.heuristics import (
    MOE_FEW_ROWS,
    MoEVariant,
    moe_experts_runs_on,
    moe_experts_variant,
    moe_variant,
)
from hf_fastpath.modules import MoERouter, PackedExperts, packed_experts
from hf_fastpath.ops import moe_norm_router, moe_router
from hf_fastpath.ops.moe_experts import VARIANTS
from hf_fastpath.quantize import GroupQuantized, quantize_int4

QUIET = {"progress": False}
EXPERTS = "model.layers.1.feed_forward.experts"


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("rows", "count", "top_k"), [(1, 4, 2), (7, 32, 4), (5, 3, 3), (0, 4, 1)])
def test_the_router_computes_its_formula(normalize: bool, biased: bool, rows: int, count: int, top_k: int) -> None:
    torch.manual_seed(rows + count)
    x, weight, bias = torch.randn(rows, 24), torch.randn(count, 24), torch.randn(count) if biased else None
    got_logits, shares, chosen = moe_router(x, weight, bias, top_k, normalize, 2.5)
    scores = (x.double() @ weight.double().T).sigmoid()
    order = (scores if bias is None else scores + bias.double()).argsort(dim=-1, descending=True)[:, :top_k]
    assert torch.equal(chosen, order)
    expected = scores.gather(1, order)  # the bias chooses, but does not weigh
    expected = 2.5 * (expected / (expected.sum(-1, keepdim=True) + 1e-6) if normalize else expected)
    torch.testing.assert_close(shares.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got_logits.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_router_behind_a_norm_is_the_norm_then_the_router(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = Lfm2MoeRMSNorm(24, eps=1e-3).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x, weight, bias = torch.randn(5, 24).to(dtype), torch.randn(6, 24).to(dtype), torch.randn(6)
    normalized, shares, chosen = moe_norm_router(x, norm.weight.data, 1e-3, weight, bias, 2, True, 1.0)
    with torch.no_grad():
        assert torch.equal(normalized, norm(x))
    _, expected_shares, expected = moe_router(normalized, weight, bias, 2, True, 1.0)
    assert torch.equal(chosen, expected)
    assert torch.equal(shares, expected_shares)


def test_of_equal_scores_the_first_expert_is_taken() -> None:
    _, _, chosen = moe_router(torch.zeros(2, 8), torch.randn(6, 8), None, 3, True, 1.0)
    assert chosen.tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_router_has_the_bits_of_transformers(dtype: torch.dtype) -> None:
    stock, ours = (make_lfm2_moe(dtype) for _ in range(2))
    patch_model(ours, weights=None, kv_cache="static")
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    for layer in (1, 2):
        gate, block = ours.model.layers[layer].feed_forward.gate, stock.model.layers[layer].feed_forward
        assert isinstance(gate, MoERouter)
        with torch.no_grad():
            for got, expected in zip(gate(x, block.expert_bias), block.gate(x, block.expert_bias), strict=True):
                assert torch.equal(got, expected)
                assert got.dtype == expected.dtype
    unpatch_model(ours)
    assert type(ours.model.layers[1].feed_forward.gate) is Lfm2MoeTopKRouter


def random_stack(count: int, rows: int, columns: int, group: int, zero_points: bool) -> list[GroupQuantized]:
    weights = [torch.randn(rows, columns).bfloat16() for _ in range(count)]
    return [quantize_int4(weight, group, zero_points=zero_points) for weight in weights]


def mixture(
    hidden: int, intermediate: int, groups: tuple[int, int], zero_points: bool
) -> tuple[Any, Any, PackedExperts]:
    gate_up = random_stack(5, 2 * intermediate, hidden, groups[0], zero_points)
    down = random_stack(5, hidden, intermediate, groups[1], zero_points)
    return gate_up, down, PackedExperts.from_quantized(gate_up, down)


def by_formula(x: Any, chosen: Any, shares: Any, gate_up: Any, down: Any) -> torch.Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64)
    for row in range(len(x)):
        for expert, share in zip(chosen[row].tolist(), shares[row].double(), strict=True):
            gate, up = (gate_up[expert].dequantize().double() @ x[row].double()).chunk(2)
            out[row] += share * (down[expert].dequantize().double() @ (torch.nn.functional.silu(gate) * up))
    return out


@pytest.mark.parametrize("zero_points", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rows", "hidden", "intermediate", "groups"),
    [(1, 64, 32, (64, 32)), (9, 128, 160, (128, 32)), (33, 96, 64, (32, 64)), (3, 32, 96, (32, 32))],
)
def test_the_experts_compute_their_formula(
    zero_points: bool, dtype: torch.dtype, rows: int, hidden: int, intermediate: int, groups: tuple[int, int]
) -> None:
    torch.manual_seed(rows)
    gate_up, down, packed = mixture(hidden, intermediate, groups, zero_points)
    x = torch.randn(rows, hidden).to(dtype)
    chosen = torch.stack([torch.randperm(4)[:3] for _ in range(rows)])  # the last expert is never chosen
    shares = torch.rand(rows, 3).to(dtype)
    for stack in (packed.gate_up, packed.down):  # what is not chosen is not read
        stack.scales[4] = float("nan")
    with torch.no_grad():
        got = packed(x, chosen, shares)
    expected = by_formula(x, chosen, shares, gate_up, down)
    # gate, up, silu(gate), their product and the sum are each rounded to the dtype: relative to the largest values of
    # a row about 4 half-steps of 2^-8 in bf16, and in float32 what summing `intermediate` products leaves.
    tolerance = 4 * 2**-9 if dtype == torch.bfloat16 else 1e-5
    assert got.dtype == dtype
    assert float((got.double() - expected).abs().max()) <= tolerance * float(expected.abs().max())
    residual = 10 * torch.randn(rows, hidden).to(dtype)
    with torch.no_grad():
        got = packed(x, chosen, shares, residual)
    expected += residual.double()
    assert float((got.double() - expected).abs().max()) <= tolerance * float(expected.abs().max())


def test_every_way_of_computing_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    _, _, packed = mixture(64, 32, (64, 32), True)
    x, chosen = torch.randn(6, 64), torch.stack([torch.randperm(5)[:2] for _ in range(6)])
    shares = torch.rand(6, 2)
    with torch.no_grad():
        expected = packed(x, chosen, shares)
        packed.reference = True
        assert torch.equal(packed(x, chosen, shares), expected)
        monkeypatch.setattr(packed_experts, "moe_variant", lambda *_: MoEVariant.CUDA_DEQUANTIZE)
        torch.testing.assert_close(packed(x, chosen, shares), expected, rtol=1e-5, atol=1e-5)
    monkeypatch.undo()
    leaf = x.clone().requires_grad_()
    packed(leaf, chosen, shares).sum().backward()
    step = 1e-2 * torch.randn_like(x)
    with torch.no_grad():
        change = packed(x + step, chosen, shares).sum() - packed(x - step, chosen, shares).sum()
    torch.testing.assert_close((2 * step * leaf.grad).sum(), change, rtol=0.02, atol=1e-3)


def test_where_experts_run() -> None:
    for rows in (1, 1000):
        assert moe_variant("cpu", rows) is MoEVariant.OP
        assert moe_variant("cuda", rows, capability=(9, 0)) is MoEVariant.OP
        assert moe_variant("cuda", rows, reference=True) is MoEVariant.REFERENCE
    assert moe_variant("cuda", 16, capability=(8, 0)) is MoEVariant.OP
    assert moe_variant("cuda", 1000, capability=(8, 0)) is MoEVariant.CUDA_DEQUANTIZE


def test_the_variant_is_the_smallest_that_most_experts_rows_fit() -> None:
    for rows in (1, 16, MOE_FEW_ROWS):
        assert moe_experts_variant(rows, 4, 32, (9, 0)) == 0
    for rows, tokens in ((65, 32), (170, 32), (256, 64), (512, 128), (2048, 256), (100_000, 256)):
        assert VARIANTS[moe_experts_variant(rows, 4, 32, (9, 0))].tokens == tokens
    assert moe_experts_variant(512, 4, 32, (8, 0)) == 0  # where it is asked for: the only form there
    assert moe_experts_variant(512, 4, 300, (9, 0)) == 0  # more experts than the others take
    assert [moe_experts_runs_on(i, (8, 9)) for i in range(3)] == [True, False, False]


def test_the_router_keeps_the_bits_of_stock_unless_layers_are_packed() -> None:
    gate = "model.layers.1.feed_forward.gate"
    exact = patch_model(make_lfm2_moe(), weights=None, kv_cache="static")
    assert not exact.get_submodule(gate).on_kernel
    packed = patch_model(make_lfm2_moe(), keep_original=True, **QUIET)
    assert packed.get_submodule(gate).on_kernel
    unpatch_model(packed)
    assert type(packed.get_submodule(gate)) is Lfm2MoeTopKRouter


def experts_and_inputs() -> tuple[Any, ExpertInputs]:
    """Experts whose inputs have a few strong channels that go together, as in trained models."""
    torch.manual_seed(0)
    experts = make_lfm2_moe(hidden_size=128, moe_intermediate_size=64).model.layers[1].feed_forward.experts
    mixing = torch.randn(128, 128) * torch.exp(torch.randn(128))
    hidden = torch.randn(3000, 128) @ mixing / 10
    return experts, ExpertInputs(hidden, torch.randint(0, 4, (3000, 2)))


def test_searches_that_look_at_inputs_leave_less_error() -> None:
    experts, inputs = experts_and_inputs()
    seen = ExpertInputs(inputs.hidden[:2000], inputs.chosen[:2000])
    unseen, shares = inputs.hidden[2000:], torch.rand(1000, 2)
    chosen = torch.stack([torch.randperm(4)[:2] for _ in range(1000)])
    with torch.no_grad():
        expected = experts(unseen, chosen, shares)
    errors = {}
    for search in ("absmax", "activation", "output"):
        config = FastpathConfig(scale_search=search)  # type: ignore[arg-type]
        measured = None if search == "absmax" else seen
        packed = PackedExperts.from_quantized(*quantize_experts(experts, (64, 64), config, measured))
        with torch.no_grad():
            errors[search] = float((packed(unseen, chosen, shares) - expected).square().mean())
    assert errors["activation"] < 0.9 * errors["absmax"]
    assert errors["output"] < 0.8 * errors["activation"]


def test_an_expert_with_too_few_tokens_is_measured_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = ExpertInputs(torch.randn(200, 8), torch.tensor([[0, 1]] * 190 + [[2, 1]] * 10))
    assert len(inputs.of(0)) == 190
    assert len(inputs.of(2)) == len(inputs.of(3)) == 200
    monkeypatch.setattr(expert_search, "_LEAST_TOKENS", 5)
    assert torch.equal(inputs.of(2), inputs.hidden[190:])
    assert len(inputs.without_first(50).hidden) == 196


@pytest.mark.parametrize("search", ["absmax", "mse", "activation", "output"])
def test_every_search_packs_every_expert_and_reports_it(search: str, prompt: torch.Tensor) -> None:
    model = make_lfm2_moe(initializer_range=0.05)
    before = logits(model, prompt)
    patch_model(model, scale_search=search, **QUIET)
    for layer in (1, 2):
        experts = model.get_submodule(EXPERTS.replace(".1.", f".{layer}."))
        assert isinstance(experts, PackedExperts)
    report = fastpath_report(model)
    rows = {row.name: row for row in report.rows}
    assert rows[EXPERTS].action == "int4 g64 and g32 + zeros"
    assert rows[EXPERTS].kind == "Lfm2MoeExperts"
    assert rows[EXPERTS].bytes_after == model.get_submodule(EXPERTS).nbytes < 0.2 * rows[EXPERTS].bytes_before
    assert rows["model.layers.1.feed_forward.gate"].action == "left"
    assert not any(name.startswith(f"{EXPERTS}.") for name in rows)  # counted once
    relative = float((logits(model, prompt) - before).norm() / before.norm())
    assert 1e-3 < relative < 0.3


def test_unpatching_restores_or_expands_the_experts(prompt: torch.Tensor) -> None:
    kept = make_lfm2_moe()
    before, state = logits(kept, prompt), fingerprint(kept)
    unpatch_model(patch_model(kept, keep_original=True, **QUIET))
    assert fingerprint(kept) == state
    assert torch.equal(logits(kept, prompt), before)
    model = patch_model(make_lfm2_moe(), **QUIET)
    gate_up, down = model.get_submodule(EXPERTS).dequantized_weights()
    with pytest.raises(Unsupported, match="were not kept"):
        unpatch_model(model)
    unpatch_model(model, dequantize=True)
    experts = model.get_submodule(EXPERTS)
    assert type(experts) is Lfm2MoeExperts
    assert torch.equal(experts.gate_up_proj, gate_up.float())
    assert torch.equal(experts.down_proj, down.float())
    assert logits(model, prompt).isfinite().all()


def with_hook(experts: Any) -> None:
    experts.register_forward_hook(lambda *_: None)


def with_another_class(experts: Any) -> None:
    experts.__class__ = type("Mine", (Lfm2MoeExperts,), {})


@pytest.mark.parametrize(
    ("change", "overrides", "reason"),
    [
        (None, {"skip_modules": ("experts",)}, "in skip_modules"),
        (None, {"weights": None}, "weights=None"),
        (with_hook, {}, "has hooks"),
        (with_another_class, {}, "Mine, not a plain Lfm2MoeExperts"),
    ],
)
def test_experts_that_are_left_are_named(change: Any, overrides: dict[str, Any], reason: str, prompt: Any) -> None:
    model = make_lfm2_moe()
    if change is not None:
        change(model.get_submodule(EXPERTS))
    patch_model(model, **QUIET, **overrides)
    row = {row.name: row for row in fastpath_report(model).rows}[EXPERTS]
    assert row.action == "left"
    assert reason in row.reason
    assert logits(model, prompt).isfinite().all()


def nan_expert(model: Any) -> None:
    with torch.no_grad():
        model.get_submodule(EXPERTS).down_proj[2, 3, 4] = float("nan")


@pytest.mark.parametrize(
    ("sizes", "change", "message"),
    [
        ({"moe_intermediate_size": 40}, None, rf"{EXPERTS}.down_proj: 40 input features.*skip_modules"),
        ({}, nan_expert, rf"{EXPERTS}.down_proj: the weight holds NaN"),
    ],
)
def test_what_does_not_fit_is_refused(sizes: dict[str, int], change: Any, message: str) -> None:
    model = make_lfm2_moe(**sizes)
    if change is not None:
        change(model)
    state = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        patch_model(model, **QUIET)
    assert fingerprint(model) == state


def test_the_op_takes_no_tokens() -> None:
    _, _, packed = mixture(64, 32, (64, 32), True)
    empty = torch.empty(0, 2)
    with torch.no_grad():
        assert packed(torch.empty(0, 64), empty.long(), empty).shape == (0, 64)
