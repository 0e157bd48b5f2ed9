"""Paired statistics against numbers worked out by other means."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from hf_fastpath.eval.significance import bootstrap_interval, difference, mcnemar, standard_error


def two_sided(lost: int, won: int) -> float:
    """By going through every way in which that many coins can fall."""
    coins, least = lost + won, min(lost, won)
    falls = [sum(fall) for fall in itertools.product((0, 1), repeat=coins)]
    return sum(heads <= least or heads >= coins - least for heads in falls) / len(falls)


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (0, 5), (1, 9), (3, 7), (6, 6), (8, 2)])
def test_mcnemar_counts_coins(lost: int, won: int) -> None:
    assert mcnemar(lost, won) == pytest.approx(min(1.0, two_sided(lost, won)), abs=1e-12)


def test_mcnemar_of_many_changes_is_nearly_normal() -> None:
    lost, won = 1050, 950
    z = (lost - won - 1) / math.sqrt(lost + won)
    assert mcnemar(lost, won) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)


def test_the_bootstrap_of_a_mean_is_nearly_normal() -> None:
    values = np.random.default_rng(1).choice([-1.0, 0.0, 1.0], p=[0.1, 0.75, 0.15], size=4000)
    low, high = bootstrap_interval(values.tolist(), seed=2)
    error = standard_error(values.tolist())
    assert error is not None
    # 10,000 resamples place a 2.5% quantile within 3 * sqrt(0.025 / 10,000) / 0.058 = 0.08 standard errors.
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)
    assert (low, high) == bootstrap_interval(values.tolist(), seed=2)
    assert bootstrap_interval([0.0, 0.0], seed=2) == (0.0, 0.0)


def test_a_difference_by_hand() -> None:
    stock = [[-1.0, -2.0], [-3.0, -1.0], [-1.0, -1.5], [-2.0, -0.5]]
    own = [[-2.0, -1.0], [-3.0, -1.0], [-1.0, -1.5], [-2.0, -0.5]]
    found = difference([0, 1, 1, 0], [1, 1, 0, 0], own, stock, seed=0)
    assert (found.delta, found.lost, found.won, found.p) == (0.0, 1, 1, 1.0)
    assert found.delta_se == pytest.approx(math.sqrt(2 / 3) / 2)
    assert found.changed == 0.25
    p = math.exp(-1) / (math.exp(-1) + math.exp(-2))
    assert found.kl == pytest.approx((p * math.log(p / (1 - p)) + (1 - p) * math.log((1 - p) / p)) / 4)
    assert found.likelihood_change == pytest.approx(2 / 8)


def test_other_questions_cannot_be_compared() -> None:
    for right, likelihoods in (([1], [[-1.0, -2.0]] * 2), ([1, 0], [[-1.0], [-1.0, -2.0]]), ([], [])):
        with pytest.raises(ValueError, match="the same questions"):
            difference(right, [1, 1][: len(right)], likelihoods, [[-1.0, -2.0]] * len(likelihoods), seed=0)
