"""What comparisons with a baseline say: the win rate, its interval over prompts, and what is left of it at equal lengths. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .estimators import interval

MOST = 30.0  # of a log-odds: where every comparison is won it has no bound
RIDGE = 0.01  # of the length's coefficient, for few comparisons; a comparison weighs 1


@dataclass(frozen=True)
class Compared:
    """One comparison.

    Attributes:
        prompt: which prompt it is of.
        score: 1 won, 0 lost, 0.5 tied, or a probability.
        length, baseline_length: of both answers, in any unit.
    """

    prompt: int
    score: float
    length: int
    baseline_length: int


@dataclass(frozen=True)
class WinRate:
    """The outcome of many comparisons.

    Attributes:
        wins, ties, losses: scores above, at and below one half.
        value, low, high: the mean score over prompts and its 95 % bootstrap interval over prompts.
        length_controlled: see `length_controlled`.
        mean_length, mean_baseline_length: over the comparisons.
    """

    wins: int
    ties: int
    losses: int
    value: float
    low: float
    high: float
    length_controlled: float
    mean_length: float
    mean_baseline_length: float


def win_rate(compared: Sequence[Compared]) -> WinRate:
    """The win rate; a tie is half a win. A prompt with several comparisons counts once.

    Raises:
        ValueError: there is no comparison.
    """
    if not compared:
        raise ValueError("win_rate: expected at least one comparison, got none")
    by_prompt: dict[int, list[float]] = {}
    for each in compared:
        by_prompt.setdefault(each.prompt, []).append(each.score)
    means = [math.fsum(scores) / len(scores) for scores in by_prompt.values()]
    low, high = interval(means)
    return WinRate(
        wins=sum(each.score > 0.5 for each in compared),
        ties=sum(each.score == 0.5 for each in compared),
        losses=sum(each.score < 0.5 for each in compared),
        value=math.fsum(means) / len(means),
        low=low,
        high=high,
        length_controlled=length_controlled(compared),
        mean_length=math.fsum(each.length for each in compared) / len(compared),
        mean_baseline_length=math.fsum(each.baseline_length for each in compared) / len(compared),
    )


def length_controlled(compared: Sequence[Compared]) -> float:
    """The win rate that a logistic regression gives two answers of the same length.

    P(win) = σ(θ + φ tanh(d / s)), d the difference of the lengths and s its root mean square; the value is σ(θ). This is the length
    term of arXiv:2404.04475, Eq. 2, without its term for each prompt's difficulty, which needs many models.
    """
    gaps = [each.length - each.baseline_length for each in compared]
    scale = math.sqrt(math.fsum(gap * gap for gap in gaps) / len(gaps)) or 1.0
    features = [math.tanh(gap / scale) for gap in gaps]
    theta = phi = 0.0
    for _ in range(100):  # Newton's method on a concave objective of two unknowns
        chances = [_sigmoid(theta + phi * x) for x in features]
        slopes = [each.score - p for each, p in zip(compared, chances, strict=True)]
        g0, g1 = math.fsum(slopes), math.fsum(s * x for s, x in zip(slopes, features, strict=True)) - RIDGE * phi
        curves = [p * (1 - p) for p in chances]
        h00 = math.fsum(curves) + 1e-9
        h01 = math.fsum(c * x for c, x in zip(curves, features, strict=True))
        h11 = math.fsum(c * x * x for c, x in zip(curves, features, strict=True)) + RIDGE
        determinant = h00 * h11 - h01 * h01
        steps = (h11 * g0 - h01 * g1) / determinant, (h00 * g1 - h01 * g0) / determinant
        largest = max(map(abs, steps))
        shrink = min(1.0, 2.0 / largest) if largest else 1.0
        theta, phi = (max(-MOST, min(MOST, value + shrink * step)) for value, step in ((theta, steps[0]), (phi, steps[1])))
        if largest < 1e-10:
            break
    return _sigmoid(theta)


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-max(-700.0, min(700.0, value))))
