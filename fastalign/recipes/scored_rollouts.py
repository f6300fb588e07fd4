"""Rollouts with their rewards: what online learning and rejection sampling share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..data import Prompt, columns_of_prompts
from ..generation import Engine, SamplingParams
from ..rewards import RewardSet
from ..rewards.combinations import COMBINATIONS, total_of
from ..rollout import Rollout, Sample
from .rollout_metrics import reward_metrics, turn_metrics
from .samplers import OnGroup, Sampler, single_turn

NUM_SHOWN = 6
_TOTAL = ""  # the name of what was combined, beside those of rewards


class ScoringGroups:
    """Gives a rollout's groups to the rewards as they end.

    Args:
        rewards: that `score` will be called with.
        prompts: of the rollout.
        size: samples of a prompt.
    """

    def __init__(self, rewards: RewardSet, prompts: list[Prompt], size: int) -> None:
        self.prompts, self.size, self.early = prompts, size, rewards.begin()
        self.columns = sorted({name for prompt in prompts for name in prompt.columns})

    @property
    def on_group(self) -> OnGroup | None:
        """For the sampler; None where no reward of the set can begin early."""
        return self._begin if self.early.begins else None

    def _begin(self, place: int, samples: list[Sample]) -> None:
        prompt, count = self.prompts[place], len(samples)
        self.early.add(
            range(place * self.size, place * self.size + count),
            [prompt.prompt] * count,
            [sample.text for sample in samples],
            [sample.ids for sample in samples],
            {name: [prompt.columns.get(name)] * count for name in self.columns},
        )

    @property
    def seconds(self) -> float:
        """Seconds of the rewards' calls, added up, that passed while completions were generated."""
        return self.early.seconds

    def __enter__(self) -> ScoringGroups:
        return self

    def __exit__(self, *error: object) -> None:
        self.early.close()


def score(
    rewards: RewardSet,
    prompts: list[Prompt],
    rollout: Rollout,
    groups: ScoringGroups | None = None,
    *,
    beside: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """Fills in every sample's rewards; one that was broken off has none.

    Args:
        groups: what has been begun.
        beside: weights of the rewards that the samples have already, an environment's: they are added to what the others come to.
    """
    owners = [prompt for prompt, samples in zip(prompts, rollout.samples, strict=True) for _ in samples]
    samples = rollout.flat
    scores = rewards.score(
        [owner.prompt for owner in owners],
        [sample.text for sample in samples],
        [sample.ids for sample in samples],
        dict(sorted(columns_of_prompts(owners).items())),
        early=None if groups is None else groups.early,
    )
    for name, values in scores.items():
        for sample, value in zip(samples, values, strict=True):
            sample.rewards[name] = math.nan if sample.finish_reason == "abort" else value
    if rewards.combination != "sum" or rewards.shaping:
        shaping = {name: rewards.weights[name] for name in rewards.shaping}
        combined = {name: weight for name, weight in rewards.weights.items() if name not in shaping}
        for group in rollout.samples:
            totals = COMBINATIONS[rewards.combination]([s.rewards for s in group], combined)
            for sample, total in zip(group, totals, strict=True):
                sample.unshaped = total_of({_TOTAL: total, **sample.rewards}, {_TOTAL: 1.0, **beside})
                shaped = total_of({_TOTAL: sample.unshaped, **sample.rewards}, {_TOTAL: 1.0, **shaping})
                sample.total = math.nan if math.isnan(sample.unshaped) else shaped


def greedy_params(params: SamplingParams) -> SamplingParams:
    """The most probable completion under the same limits."""
    return SamplingParams(temperature=0.0, max_tokens=params.max_tokens, stop=params.stop)


def greedy(engine: Engine, rewards: RewardSet, prompts: list[Prompt], params: SamplingParams, sampler: Sampler = single_turn) -> Rollout:
    """The most probable completion of each prompt under the weights as they are, scored; `params` gives its limits."""
    rollout = sampler(engine, prompts, greedy_params(params))
    engine.release_cache()  # the update, or another engine, has the memory
    score(rewards, prompts, rollout, beside=sampler.weights)
    return rollout


def evaluate(
    engine: Engine, rewards: RewardSet, prompts: list[Prompt], params: SamplingParams, sampler: Sampler = single_turn
) -> dict[str, float]:
    """Mean rewards of greedy completions, keys starting with eval/; empty where there is no prompt."""
    if not prompts:
        return {}
    samples = greedy(engine, rewards, prompts, params, sampler).flat
    found = reward_metrics(samples, rewards.weights | sampler.weights) | turn_metrics(samples)
    return {f"eval/{key}": value for key, value in found.items()}


def show(
    engine: Engine, rewards: RewardSet, prompts: list[Prompt], params: SamplingParams, sampler: Sampler = single_turn
) -> list[dict[str, Any]]:
    """Greedy completions of the first few prompts, with their rewards."""
    prompts = prompts[:NUM_SHOWN]
    weights = rewards.weights | sampler.weights
    return [
        {
            "prompt": engine.tokenizer.decode(p.ids, skip_special_tokens=True),
            "completion": s.text,
            "reward": s.reward(weights),
        }
        for p, s in zip(prompts, greedy(engine, rewards, prompts, params, sampler).flat, strict=True)
    ]
