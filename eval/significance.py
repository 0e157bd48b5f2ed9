"""Whether a difference between two models on the same questions is more than chance."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

RESAMPLES = 10_000


def mcnemar(lost: int, won: int) -> float:
    """The exact two-sided p-value of McNemar's test (1947): how likely so uneven a split of the ``lost + won``
    questions that changed sides is, when either way is as likely."""
    changed = lost + won
    tail = sum(math.comb(changed, count) for count in range(min(lost, won) + 1))
    # Integers to the end: 2^changed overflows a float from 1,024 on.
    return min(1.0, (2 * tail * 10**15 // 2**changed) / 10**15)


def bootstrap_interval(differences: Sequence[float], seed: int, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of the mean of paired ``differences`` (Efron and Tibshirani, 1993, chapter 13).

    Resampling n questions with replacement is drawing how often each distinct difference occurs.
    """
    values, counts = np.unique(np.asarray(differences, dtype=np.float64), return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(counts.sum(), counts / counts.sum(), size=RESAMPLES)
    means = drawn @ values / counts.sum()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean, the values being independent; None of fewer than two."""
    if len(values) < 2:
        return None
    return float(np.std(np.asarray(values, dtype=np.float64), ddof=1) / math.sqrt(len(values)))


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of one model from the stock one on the same multiple-choice questions.

    delta: of the accuracy, with its standard error and 95% interval, questions paired. p: McNemar's. lost, won:
    questions that only stock, and only this model answers rightly. changed: share of questions with another answer.
    kl: divergence of the distribution over the choices from stock's, nats a question. likelihood_change: mean absolute
    change of a choice's log-likelihood, nats.
    """

    delta: float
    delta_se: float | None
    interval: tuple[float, float]
    p: float
    lost: int
    won: int
    changed: float
    kl: float
    likelihood_change: float

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def difference(
    right: Sequence[float],
    stock_right: Sequence[float],
    likelihoods: Sequence[Sequence[float]],
    stock_likelihoods: Sequence[Sequence[float]],
    seed: int,
) -> Difference:
    """Args:
    right, stock_right: 1 or 0 a question. likelihoods, stock_likelihoods: log-likelihoods of its choices, nats.

    Raises:
        ValueError: they are not of the same questions.
    """
    sizes = [len(part) for part in (right, stock_right, likelihoods, stock_likelihoods)]
    if len(set(sizes)) > 1 or not sizes[0] or [*map(len, likelihoods)] != [*map(len, stock_likelihoods)]:
        raise ValueError(f"paired statistics need the same questions, got {', '.join(map(str, sizes))} of them")
    differences = [float(own) - float(other) for own, other in zip(right, stock_right, strict=True)]
    kl, changed, moved = [], 0, []
    for own, other in zip(likelihoods, stock_likelihoods, strict=True):
        q, p = (_log_softmax(np.asarray(row, dtype=np.float64)) for row in (own, other))
        kl.append(float(np.sum(np.exp(p) * (p - q))))
        changed += int(np.argmax(own) != np.argmax(other))
        moved += [abs(a - b) for a, b in zip(own, other, strict=True)]
    lost, won = (sum(step == wanted for step in differences) for wanted in (-1.0, 1.0))
    return Difference(
        delta=float(np.mean(differences)),
        delta_se=standard_error(differences),
        interval=bootstrap_interval(differences, seed),
        p=mcnemar(lost, won),
        lost=lost,
        won=won,
        changed=changed / len(differences),
        kl=float(np.mean(kl)),
        likelihood_change=float(np.mean(moved)),
    )


def _log_softmax(values: Any) -> Any:
    shifted = values - values.max()
    return shifted - np.log(np.exp(shifted).sum())
