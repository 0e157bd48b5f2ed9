"""Coordinate descent on the error of a layer's output: against brute force, float64, and plain rounding."""

from __future__ import annotations

import itertools

import pytest
import torch

from hf_fastpath import error_feedback
from hf_fastpath.column_steps import BAND, ColumnSteps
from hf_fastpath.config import ScaleSearch
from hf_fastpath.error_feedback import CoordinateDescent, Hessian, quantize_with_feedback
from hf_fastpath.quantize import GroupQuantized, quantize_int4


def correlated(tokens: int, channels: int, seed: int = 0) -> torch.Tensor:
    """Inputs as trained layers have them: a few directions carry much, and channels differ in energy."""
    torch.manual_seed(seed)
    mixed = torch.randn(tokens, channels // 4) @ torch.randn(channels // 4, channels)
    return (mixed + 0.5 * torch.randn(tokens, channels)) * torch.exp(torch.randn(channels))


def moment_of(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / x.shape[0]


def regularized(moment: torch.Tensor) -> torch.Tensor:
    """The whole of the matrix whose quadratic form is minimized."""
    return Hessian(moment).rows(slice(None))


def values(quantized: GroupQuantized) -> torch.Tensor:
    """(q - zero) * scale in float64."""
    n, k = quantized.q.shape
    zero = 8.0 if quantized.zero is None else quantized.zero.double().unsqueeze(-1)
    codes = quantized.q.double().view(n, -1, quantized.group_size)
    return ((codes - zero) * quantized.scale.double().unsqueeze(-1)).view(n, k)


def output_error(quantized: GroupQuantized, weight: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """(N,) in float64: the quadratic form of each row."""
    error = weight.double() - values(quantized)
    return ((error @ moment.double()) * error).sum(-1)


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_no_sweep_raises_the_error_of_any_row(zero_points: bool, group_size: int) -> None:
    weight = torch.randn(24, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    moment = moment_of(correlated(600, 256))
    hessian = regularized(moment)
    errors = [
        output_error(
            quantize_with_feedback(weight, moment, group_size, zero_points=zero_points, sweeps=sweeps), weight, hessian
        )
        for sweeps in range(5)
    ]
    # The gradient is kept up to date in float32: 256 products an element, of which rounding may leave a part in 10^5.
    for before, after in itertools.pairwise(errors):
        assert bool((after <= before * (1 + 1e-5)).all())
    assert float(errors[1].sum()) < 0.9 * float(errors[0].sum())


@pytest.mark.parametrize("zero_points", [False, True])
def test_less_error_on_unseen_inputs_than_the_diagonal_search(zero_points: bool) -> None:
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(2)).bfloat16()
    torch.manual_seed(0)
    x = correlated(4000, 128)
    moment, unseen = moment_of(x[:2000]), moment_of(x[2000:])
    diagonal = quantize_int4(
        weight, 64, zero_points=zero_points, search=ScaleSearch.ACTIVATION, importance=moment.diagonal()
    )
    feedback = quantize_with_feedback(weight, moment, 64, zero_points=zero_points)
    assert output_error(feedback, weight, unseen).sum() < 0.6 * output_error(diagonal, weight, unseen).sum()


def test_every_code_ends_at_its_minimum_given_the_others() -> None:
    """Brute force in float64: no other code of any one weight has less error."""
    weight = torch.randn(3, 32, generator=torch.Generator().manual_seed(3))
    moment = moment_of(correlated(200, 32, seed=4))
    hessian = regularized(moment)
    result = quantize_with_feedback(weight, moment, 32, sweeps=40)
    best = output_error(result, weight, hessian)
    for column, code in itertools.product(range(32), range(16)):
        q = result.q.clone()
        q[:, column] = code
        other = GroupQuantized(q, result.scale, result.zero, 32)
        assert bool((output_error(other, weight, hessian) >= best * (1 - 1e-5)).all())  # float32 ties


def test_one_sweep_equals_a_naive_float64_loop() -> None:
    weight = torch.randn(1, 64, generator=torch.Generator().manual_seed(5))
    moment = moment_of(correlated(300, 64, seed=6))
    moved, start = (quantize_int4(weight, 32, search=ScaleSearch.MSE) for _ in range(2))
    CoordinateDescent(weight, moved, Hessian(moment)).sweep()

    w, h = weight[0].double(), regularized(moment).double()
    q, scale, zero = start.q[0].double(), start.scale[0].double(), start.zero[0].double()  # type: ignore[index]
    for group in range(2):
        inside = torch.arange(32) + 32 * group
        for k in inside.tolist():
            error = w - (q - zero.repeat_interleave(32)) * scale.repeat_interleave(32)
            error[k] = 0  # what the others leave for this one to make up
            wanted = w[k] + (h[k] @ error) / h[k, k]
            q[k] = (wanted / scale[group] + zero[group]).round().clamp(0, 15)
        centered = torch.zeros(64, dtype=torch.float64)
        centered[inside] = q[inside] - zero[group]
        error = w - (q - zero.repeat_interleave(32)) * scale.repeat_interleave(32) + centered * scale[group]
        fitted = (centered @ h @ error) / (centered @ h @ centered)
        scale[group] = fitted.to(torch.bfloat16).double()
    assert torch.equal(moved.q[0].double(), q)
    # The same 16-bit number, or its neighbour where the float32 fit fell on the other side of a tie.
    torch.testing.assert_close(moved.scale[0].double(), scale, rtol=2**-7, atol=0)


def test_the_columns_of_a_band_step_one_after_the_other() -> None:
    torch.manual_seed(10)
    rows = 7
    codes = torch.randint(0, 16, (BAND, rows)).float()
    weights = torch.randn(BAND, BAND) / 4
    wanted = 4 * torch.randn(BAND, rows)
    steps = ColumnSteps(rows, torch.device("cpu"))
    for _ in range(2):  # buffers are used again
        steps.wanted.copy_(wanted)
        taken = steps.take(codes, weights)
        left, expected = wanted.double(), torch.empty(BAND, rows, dtype=torch.float64)
        for i in range(BAND):
            expected[i] = (codes[i] + left[i].round()).clamp(0, 15) - codes[i]
            left[i + 1 :] -= weights[i, i + 1 :, None].double() * expected[i]
        assert torch.equal(taken.double(), expected)


@pytest.mark.parametrize("zero_points", [False, True])
def test_uncorrelated_channels_leave_plain_rounding(zero_points: bool) -> None:
    """With H = I columns do not feel each other: codes are the nearest ones of their scale."""
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(7)).bfloat16()
    result = quantize_with_feedback(weight, torch.eye(64), 64, zero_points=zero_points, sweeps=20)
    zero = 8.0 if result.zero is None else result.zero.double()
    ideal = (weight.double() / result.scale.double() + zero).clamp(0, 15)
    assert float((result.q.double() - ideal).abs().max()) <= 0.5 + 1e-5  # half a step; float32 may move a tie
    found = quantize_int4(weight, 64, zero_points=zero_points, search=ScaleSearch.MSE)
    unmoved = quantize_with_feedback(weight, torch.eye(64), 64, zero_points=zero_points, sweeps=0)
    assert torch.equal(unmoved.q, found.q)


def test_groups_of_zeros_dead_channels_and_no_input_at_all() -> None:
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(8)).bfloat16()
    weight[1] = 0
    weight[2, 64:] = 0
    moment = moment_of(correlated(300, 128))
    moment[:, 5] = moment[5] = 0
    for given in (moment, torch.zeros(128, 128)):
        result = quantize_with_feedback(weight, given, 64).dequantize()
        assert bool(result.isfinite().all())
        assert not bool(result[1].any())
        assert not bool(result[2, 64:].any())
        assert abs(float(result[0, 5] - weight[0, 5])) < 0.5  # a channel that was never driven stays near its weight


def test_result_does_not_depend_on_chunking(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(50, 64, generator=torch.Generator().manual_seed(9)).bfloat16()
    moment = moment_of(correlated(300, 64))
    whole = quantize_with_feedback(weight, moment, 32)
    monkeypatch.setattr(error_feedback, "_CHUNK_ELEMENTS", {"cpu": 64 * 7})
    pieces = quantize_with_feedback(weight, moment, 32)
    # Matrix products of other shapes add in another order, which can move a tie, and all that follows in that row.
    assert float((whole.q != pieces.q).float().mean()) < 0.02
    a, b = (float(output_error(one, weight, moment).sum()) for one in (whole, pieces))
    assert a == pytest.approx(b, rel=0.02)


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"64 columns must be \(64, 64\), got \(32, 32\)"):
        quantize_with_feedback(torch.zeros(4, 64), torch.eye(32), 32)
