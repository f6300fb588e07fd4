"""Solutions in the making: the tokens so far, cut into steps, and what a search says of the finished ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..data import Prompt


@dataclass(frozen=True)
class Path:
    """What a policy has written behind a prompt, in whole steps. Two with the same ids are one.

    Attributes:
        ids: token ids, separators and the stop token included.
        ends: behind which token each step ends.
        steps: the steps' texts, without separators. One that only closes the text is "".
        logprobs: nats a step, of the model at temperature 1.
        text: without the stop token or stop string.
        finish_reason: "stop" or "length"; "" while it can be gone on with.
    """

    ids: tuple[int, ...] = ()
    ends: tuple[int, ...] = field(default=(), compare=False)
    steps: tuple[str, ...] = field(default=(), compare=False)
    logprobs: tuple[float, ...] = field(default=(), compare=False)
    text: str = field(default="", compare=False)
    finish_reason: str = ""

    @property
    def finished(self) -> bool:
        return bool(self.finish_reason)


Scorer = Callable[[Sequence[Prompt], Sequence[Path]], Sequence[float | None]]  # [B] prompts and paths → what each path is worth


@dataclass(frozen=True)
class StepEstimate:
    """A step and how it turned out.

    Attributes:
        text: the step.
        mean: mean score of the rollouts that went through it; visits: how many they were.
    """

    text: str
    mean: float
    visits: int


@dataclass(frozen=True)
class SearchResult:
    """What a search found for one prompt.

    Attributes:
        paths: the finished solutions, in the order they were found.
        scores: one each; NaN where the scorer gave none.
        best: index of the chosen one.
        num_tokens: tokens drawn for this prompt, all branches together.
        num_scored: paths that a scorer judged, unfinished ones included.
        chains: of a search that estimates steps by rollouts: each branch of its tree, step by step.
    """

    paths: list[Path]
    scores: list[float]
    best: int
    num_tokens: int
    num_scored: int = 0
    chains: list[list[StepEstimate]] = field(default_factory=list)

    @property
    def path(self) -> Path:
        """The chosen solution."""
        return self.paths[self.best]

    @property
    def score(self) -> float:
        """Its score."""
        return self.scores[self.best]


def rank(score: float) -> float:
    """A score to order by: NaN below all."""
    return -math.inf if math.isnan(score) else score


def score_paths(scorer: Scorer, prompts: Sequence[Prompt], paths: Sequence[Sequence[Path]]) -> tuple[list[list[float]], list[int]]:
    """Scores of each prompt's paths in one call of the scorer; equal paths of a prompt are judged once.

    Args:
        prompts: [P]. paths: [P], ragged.

    Returns:
        (scores as `paths`, NaN for none; [P] how many were judged).

    Raises:
        ValueError: the scorer did not return one number a path.
    """
    distinct = [list(dict.fromkeys(own)) for own in paths]
    owners = [prompt for prompt, own in zip(prompts, distinct, strict=True) for _ in own]
    flat = [path for own in distinct for path in own]
    found = list(scorer(owners, flat)) if flat else []
    if len(found) != len(flat):
        raise ValueError(f"search: the scorer must return one number for each of {len(flat)} paths, got {len(found)}")
    values = iter(math.nan if value is None else float(value) for value in found)
    known = [{path: next(values) for path in own} for own in distinct]
    return [[table[path] for path in own] for table, own in zip(known, paths, strict=True)], [len(own) for own in distinct]
