"""Search by whole solutions: sample n, then choose by a score or by votes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence

from ..data import Prompt
from .paths import Path, Scorer, SearchResult, rank, score_paths
from .policy import Policy, Stem

Vote = Callable[[str], Hashable | None]  # a solution's text → what it votes for; None: nothing


def sample(policy: Policy, prompts: Sequence[Prompt], n: int) -> list[list[Path]]:
    """n whole solutions a prompt.

    Raises:
        ValueError: n below 1.
    """
    if n < 1:
        raise ValueError(f"search: expected at least one solution a prompt, got n={n}")
    return policy.complete([Stem(prompt) for prompt in prompts], n)


def best_of_n(policy: Policy, prompts: Sequence[Prompt], scorer: Scorer, *, n: int = 16) -> list[SearchResult]:
    """The solution of n that the scorer values most (arXiv:2110.14168); the first of those that tie."""
    paths = sample(policy, prompts, n)
    scores, judged = score_paths(scorer, prompts, paths)
    return [chosen(own, given, best_index(given), count) for own, given, count in zip(paths, scores, judged, strict=True)]


def majority_vote(policy: Policy, prompts: Sequence[Prompt], vote: Vote, *, n: int = 16) -> list[SearchResult]:
    """The first solution of n with the most frequent answer: self-consistency (arXiv:2203.11171). Its score is the answer's share."""
    paths = sample(policy, prompts, n)
    return [voted(own, [vote(path.text) for path in own], [1.0] * len(own)) for own in paths]


def weighted_vote(
    policy: Policy,
    prompts: Sequence[Prompt],
    scorer: Scorer,
    vote: Vote,
    *,
    n: int = 16,
    weight: Callable[[float], float] = lambda score: max(score, 0.0),
) -> list[SearchResult]:
    """The first solution of n whose answer has the largest sum of weights (arXiv:2206.02336); `weight` is of a score."""
    paths = sample(policy, prompts, n)
    scores, judged = score_paths(scorer, prompts, paths)
    return [
        voted(own, [vote(path.text) for path in own], [weigh(weight, score) for score in given], count)
        for own, given, count in zip(paths, scores, judged, strict=True)
    ]


def weigh(weight: Callable[[float], float], score: float) -> float:
    """A vote's weight; 0 without a score."""
    return 0.0 if math.isnan(score) else weight(score)


def best_index(scores: Sequence[float]) -> int:
    """Of the highest score; the first of those that tie, NaN below all."""
    return max(range(len(scores)), key=lambda i: (rank(scores[i]), -i))


def voted(paths: list[Path], answers: Sequence[Hashable | None], weights: Sequence[float], num_scored: int = 0) -> SearchResult:
    """The first solution of the answer with the most weight, answers that tie in the order of their first solution.

    A solution's score is its answer's share of the weight; where nobody votes the first solution is chosen.
    """
    votes: defaultdict[Hashable, float] = defaultdict(float)
    for answer, given in zip(answers, weights, strict=True):
        if answer is not None:
            votes[answer] += given
    total = sum(votes.values())
    shares = [math.nan if answer is None else votes[answer] / total if total else 0.0 for answer in answers]
    return chosen(paths, shares, best_index(shares), num_scored)


def chosen(paths: list[Path], scores: list[float], best: int, num_scored: int) -> SearchResult:
    """A result of solutions that were drawn one by one, each from the prompt."""
    return SearchResult(paths, scores, best, sum(len(path.ids) for path in paths), num_scored)
