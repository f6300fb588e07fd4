"""How several rewards of a completion become one number: added, one as the gate of the others, or each put on one scale first."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev

Rewards = Mapping[str, float]  # by name; NaN where one is missing


def weighted_sum(group: Sequence[Rewards], weights: Mapping[str, float]) -> list[float]:
    """Σ w r of the rewards that exist; NaN where a completion has none."""
    return [total_of(rewards, weights) for rewards in group]


def gated(group: Sequence[Rewards], weights: Mapping[str, float]) -> list[float]:
    """The first reward times the weighted sum of the others: a right answer in the wrong format is worth nothing. NaN without the first."""
    if len(weights) < 2:
        return [math.nan for _ in group]
    gate, *others = weights
    rest = {name: weights[name] for name in others}
    return [weights[gate] * rewards[gate] * total_of(rewards, rest) for rewards in group]


def normalized(group: Sequence[Rewards], weights: Mapping[str, float]) -> list[float]:
    """Each reward less its mean over the group, over its deviation (+ 1e-4), then the weighted sum (GDPO, arXiv:2601.05242).

    So a reward of small spread counts as much as one of large spread. A reward that is the same for all counts nothing. Of a group of
    one, as at evaluation, there is nothing to normalize by: its rewards are added as they are.
    """
    if len(group) < 2:
        return weighted_sum(group, weights)
    scaled = {name: _z_scores([rewards[name] for rewards in group]) for name in weights}
    return [total_of({name: values[i] for name, values in scaled.items()}, weights) for i in range(len(group))]


def total_of(rewards: Rewards, weights: Mapping[str, float]) -> float:
    """Σ w r of the rewards that exist; NaN where none does."""
    found = [weight * rewards[name] for name, weight in weights.items() if not math.isnan(rewards.get(name, math.nan))]
    return sum(found) if found else math.nan


def _z_scores(values: list[float]) -> list[float]:
    found = [value for value in values if not math.isnan(value)]
    if len(found) < 2 or min(found) == max(found):
        return [value if math.isnan(value) else 0.0 for value in values]
    mean, deviation = fmean(found), stdev(found)
    return [(value - mean) / (deviation + 1e-4) for value in values]


COMBINATIONS: dict[str, Callable[[Sequence[Rewards], Mapping[str, float]], list[float]]] = {
    "sum": weighted_sum,
    "gate": gated,
    "normalize": normalized,
}
