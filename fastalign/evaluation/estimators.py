"""What samples of a problem say about a model: pass@k, maj@k, best@k, and how sure one can be of their mean. Torch-free."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Hashable, Sequence
from itertools import combinations

EXACT_SUBSETS = 2000  # of more subsets, so many are drawn


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """The chance that one of k samples is right, unbiased: 1 - C(n - c, k) / C(n, k) (arXiv:2107.03374, Eq. 1).

    Raises:
        ValueError: k is not between 1 and the number of samples.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@k: k must be between 1 and the {num_samples} samples, got {k}")
    return 1 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def best_at_k(scores: Sequence[float], right: Sequence[bool], k: int) -> float:
    """The chance that the sample which a ranker scores highest of k is right (best-of-k, arXiv:2110.14168), over all subsets of k.

    Args:
        scores: the ranker's; samples that tie count their share. NaN ranks below all.

    Raises:
        ValueError: as `pass_at_k`.
    """
    count = len(scores)
    if not 1 <= k <= count:
        raise ValueError(f"best@k: k must be between 1 and the {count} samples, got {k}")
    levels: dict[float, list[bool]] = {}
    for score, hit in zip(scores, right, strict=True):
        levels.setdefault(-math.inf if math.isnan(score) else score, []).append(hit)
    below, chance = 0, 0.0
    for level in sorted(levels):
        hits = levels[level]
        upto = below + len(hits)
        tops = math.comb(upto, k) - math.comb(below, k)  # subsets whose best is of this level; within it every sample leads as often
        chance += tops / math.comb(count, k) * sum(hits) / len(hits)
        below = upto
    return chance


def maj_at_k(answers: Sequence[Hashable | None], right: Sequence[bool], k: int, weights: Sequence[float] | None = None) -> float:
    """The chance that the most frequent answer of k samples is right (arXiv:2203.11171), over all subsets of k.

    Answers that tie count their share. None does not vote; where nobody votes, nothing is right. Of more than `EXACT_SUBSETS` subsets
    that many are drawn, always the same ones.

    Args:
        weights: what each sample's vote counts, as a verifier sees it (arXiv:2206.02336); None: all alike.

    Raises:
        ValueError: as `pass_at_k`.
    """
    count = len(answers)
    if not 1 <= k <= count:
        raise ValueError(f"maj@k: k must be between 1 and the {count} samples, got {k}")
    if math.comb(count, k) <= EXACT_SUBSETS:
        subsets = list(combinations(range(count), k))
    else:
        draw = random.Random(0)
        subsets = [tuple(draw.sample(range(count), k)) for _ in range(EXACT_SUBSETS)]
    given = [1.0] * count if weights is None else weights
    return sum(_majority(answers, right, subset, given) for subset in subsets) / len(subsets)


def _majority(answers: Sequence[Hashable | None], right: Sequence[bool], subset: Sequence[int], weights: Sequence[float]) -> float:
    votes: defaultdict[Hashable, float] = defaultdict(float)
    for i in subset:
        if answers[i] is not None:
            votes[answers[i]] += weights[i]
    if not votes:
        return 0.0
    most = max(votes.values())
    leaders = [answer for answer, number in votes.items() if number == most]
    hits = [right[next(i for i in subset if answers[i] == answer)] for answer in leaders]
    return sum(hits) / len(hits)


def interval(values: Sequence[float], *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The bootstrap's percentile interval of the mean over problems (Efron 1979); of fewer than two, the value itself."""
    if len(values) < 2:
        value = values[0] if values else math.nan
        return value, value
    draw = random.Random(seed)
    means = sorted(sum(draw.choices(values, k=len(values))) / len(values) for _ in range(resamples))
    tail = (1 - level) / 2
    return means[int(tail * resamples)], means[min(resamples - 1, math.ceil((1 - tail) * resamples) - 1)]
