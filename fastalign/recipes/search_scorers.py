"""What a search is guided by, as --scorer names it: a model of steps, a model of outcomes, or a reward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from ..data import Prompt, columns_of_prompts
from ..judges.reward_model import RewardModel
from ..losses.reward import aggregate_steps
from ..rewards import RewardSet, load_rewards
from ..search import Path, Scorer
from .evaluate import probability
from .model_rewards import names_model, with_reward_models
from .search_arguments import SearchArguments
from .setup import Loaded


@dataclass(frozen=True)
class Guide:
    """A scorer and how it is read.

    Attributes:
        scorer: of finished solutions.
        bounded: the same as a tree takes it, between 0 and 1 where it is a probability's.
        weight: of a vote with a score.
        judges_steps: whether it judges unfinished solutions, too.
        check_columns: raises ValueError where the data lacks a column that it needs.
    """

    scorer: Scorer
    bounded: Scorer
    weight: Callable[[float], float]
    judges_steps: bool = False
    check_columns: Callable[[Sequence[str]], None] = lambda columns: None


def guide_of(own: SearchArguments, loaded: Loaded, closing: ExitStack) -> Guide | None:
    """The scorer that the flags name; None where they name none.

    Args:
        closing: ends what a reward has started.

    Raises:
        ValueError: neither a reward model nor a reward, or an aggregation for what has no steps.
    """
    if not own.scorer:
        return None
    if not names_model(own.scorer, "--scorer"):
        if own.score_aggregation:
            raise ValueError(f"--score_aggregation {own.score_aggregation}: --scorer {own.scorer} has no steps to aggregate; leave it out")
        return reward_guide(closing.enter_context(load_rewards(with_reward_models([own.scorer], loaded), timeout=own.reward_timeout)))
    judge = RewardModel.load(own.scorer, loaded.tokenizer, device=loaded.device)
    if judge.steps is not None:
        return step_guide(judge, own.score_aggregation or judge.aggregation)
    if own.score_aggregation:
        raise ValueError(f"--score_aggregation {own.score_aggregation}: --scorer {own.scorer} scores whole answers; leave it out")
    return outcome_guide(judge)


def step_guide(judge: RewardModel, aggregation: str) -> Guide:
    """A process reward model: the probabilities of a path's steps, aggregated. A path without a step has no score."""

    def scorer(prompts: Sequence[Prompt], paths: Sequence[Path]) -> list[float]:
        values = judge.step_values([prompt.prompt for prompt in prompts], [path.steps for path in paths])
        flat = torch.tensor([value for own in values for value in own or ()], dtype=torch.float64)
        bounds = torch.tensor([0, *(len(own or ()) for own in values)]).cumsum(0)
        return aggregate_steps(flat, bounds, aggregation).tolist()

    return Guide(scorer, scorer, lambda score: score, judges_steps=True)


def outcome_guide(judge: RewardModel) -> Guide:
    """A model of whole answers: votes and trees read σ of its score."""

    def scorer(prompts: Sequence[Prompt], paths: Sequence[Path]) -> list[float]:
        found = judge([prompt.prompt for prompt in prompts], [path.text for path in paths], [path.ids for path in paths])
        return [math.nan if value is None else value for value in found]

    def bounded(prompts: Sequence[Prompt], paths: Sequence[Path]) -> list[float]:
        return [probability(score) for score in scorer(prompts, paths)]

    return Guide(scorer, bounded, probability)


def reward_guide(rewards: RewardSet) -> Guide:
    """Rewards that can judge a finished solution; a negative one has no weight in a vote."""

    def scorer(prompts: Sequence[Prompt], paths: Sequence[Path]) -> list[float]:
        return score_texts(rewards, prompts, [path.text for path in paths], [path.ids for path in paths])

    return Guide(scorer, scorer, lambda score: max(score, 0.0), check_columns=rewards.check_columns)


def score_texts(rewards: RewardSet, prompts: Sequence[Prompt], texts: Sequence[str], ids: Sequence[Sequence[int]]) -> list[float]:
    """[B] weighted sums of the rewards; NaN where there is none."""
    columns = dict(sorted(columns_of_prompts(list(prompts)).items()))
    return rewards.combine(rewards.score([prompt.prompt for prompt in prompts], texts, ids, columns))
