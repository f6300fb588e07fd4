"""Rollouts with their rewards: what online learning and rejection sampling share."""

from __future__ import annotations

import math
from typing import Any

from ..data import Prompt, columns_of_prompts
from ..generation import Engine, SamplingParams
from ..rewards import RewardSet
from ..rewards.combinations import COMBINATIONS
from ..rollout import Rollout
from .rollout_metrics import reward_metrics, turn_metrics
from .samplers import Sampler, single_turn

NUM_SHOWN = 6


def score(rewards: RewardSet, prompts: list[Prompt], rollout: Rollout) -> None:
    """Fills in every sample's rewards; one that was broken off has none."""
    owners = [prompt for prompt, samples in zip(prompts, rollout.samples, strict=True) for _ in samples]
    samples = rollout.flat
    scores = rewards.score(
        [owner.prompt for owner in owners],
        [sample.text for sample in samples],
        [sample.ids for sample in samples],
        dict(sorted(columns_of_prompts(owners).items())),
    )
    for name, values in scores.items():
        for sample, value in zip(samples, values, strict=True):
            sample.rewards[name] = math.nan if sample.finish_reason == "abort" else value
    if rewards.combination != "sum":
        combine = COMBINATIONS[rewards.combination]
        for group in rollout.samples:
            for sample, total in zip(group, combine([s.rewards for s in group], rewards.weights), strict=True):
                sample.total = total


def greedy_params(params: SamplingParams) -> SamplingParams:
    """The most probable completion under the same limits."""
    return SamplingParams(temperature=0.0, max_tokens=params.max_tokens, stop=params.stop)


def greedy(engine: Engine, rewards: RewardSet, prompts: list[Prompt], params: SamplingParams, sampler: Sampler = single_turn) -> Rollout:
    """The most probable completion of each prompt under the weights as they are, scored; `params` gives its limits."""
    rollout = sampler(engine, prompts, greedy_params(params))
    engine.release_cache()  # the update, or another engine, has the memory
    score(rewards, prompts, rollout)
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
