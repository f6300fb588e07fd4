"""Process-supervised online learning: rewards at the end of each step → an advantage a token, no critic."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..advantages import DENSE_ADVANTAGES
from ..algorithms import StepSupervised
from ..data import Prompt, columns_of_prompts
from ..generation.stops import decode
from ..generation.text import UNFINISHED
from ..judges import RewardModel
from ..rewards import RewardSet
from ..rollout import Rollout, Sample
from .online_task import OnlineTask
from .policy import PolicyChunk, group_advantages


@dataclass(frozen=True)
class Step:
    """A step of a completion: the index of its last token, and the completion's text up to there."""

    end: int
    text: str


def steps_of(tokenizer: Any, sample: Sample, separator: str) -> list[Step]:
    """The steps of a completion: each ends with the token that completes a separator, the last one with the last token.

    Without a separator ("") every token ends one. Text that is blank makes no step of its own; it belongs to the one before. Nor does
    what an environment wrote: it belongs to the step that follows. A completion that was broken off has no steps, as it has no reward.
    """
    if sample.finish_reason == "abort":
        return []
    found: list[Step] = []
    begun, seen = 0, 0  # where the step's text begins, and how many separators were passed
    pieces: dict[int, str] = {}
    for t, token in enumerate(sample.ids[:-1]):
        if token not in pieces:
            pieces[token] = decode(tokenizer, [token])
        if separator[-1:] not in pieces[token] and UNFINISHED not in pieces[token]:
            continue  # no separator ends here: the text so far need not be decoded
        text = decode(tokenizer, sample.ids[: t + 1])
        count = text.count(separator) if separator else t + 1
        if count > seen:
            seen = count
            found, begun = _with(found, Step(t, text), begun)
    if sample.ids:
        found, begun = _with(found, Step(len(sample.ids) - 1, sample.text), begun)
    return found if sample.scored is None else _written(found, sample.scored)


def _written(steps: list[Step], scored: list[bool]) -> list[Step]:
    """The steps in which the model wrote a token."""
    begins = [0, *(step.end + 1 for step in steps)]
    return [step for begin, step in zip(begins, steps, strict=False) if any(scored[begin : step.end + 1])]


def _with(steps: list[Step], step: Step, begun: int) -> tuple[list[Step], int]:
    """The steps and one more, or the last of them longer where nothing visible was added; and where the next begins."""
    if not step.text[begun:].strip() and steps:
        return [*steps[:-1], Step(step.end, steps[-1].text)], begun
    return [*steps, step], len(step.text)


class StepReward(Protocol):
    """Judges the steps of completions."""

    def __call__(self, prompts: list[Prompt], steps: list[list[Step]], samples: list[Sample]) -> list[list[float]]:
        """[B] prompts, the steps of each one's completion, and the completions: a reward a step, NaN where one is missing."""

    def close(self) -> None:
        """Ends what it started."""


class FunctionReward:
    """Rewards of steps by a function of completions: it sees each completion cut after each step.

    Args:
        rewards: the function.
    """

    def __init__(self, rewards: RewardSet) -> None:
        self.rewards = rewards

    def __call__(self, prompts: list[Prompt], steps: list[list[Step]], samples: list[Sample]) -> list[list[float]]:
        owners = [i for i, own in enumerate(steps) for _ in own]
        cut = [(samples[i], step) for i, own in enumerate(steps) for step in own]
        scores = self.rewards.score(
            [prompts[i].prompt for i in owners],
            [step.text for _, step in cut],
            [sample.ids[: step.end + 1] for sample, step in cut],
            dict(sorted(columns_of_prompts([prompts[i] for i in owners]).items())),
        )
        values = iter(self.rewards.combine(scores))
        return [[next(values) for _ in own] for own in steps]

    def close(self) -> None:
        self.rewards.close()


class ModelReward:
    """Rewards of steps by a process reward model: the probability that each is right, from one pass over the whole completion.

    Args:
        model: of steps.
    """

    def __init__(self, model: RewardModel) -> None:
        self.model = model

    def __call__(self, prompts: list[Prompt], steps: list[list[Step]], samples: list[Sample]) -> list[list[float]]:
        separator = str(self.model.separator)
        cut = [[text.removesuffix(separator) for text in _cut(own)] for own in steps]
        found = self.model.step_values([prompt.prompt for prompt in prompts], cut)
        return [
            values if values is not None and len(values) == len(own) else [math.nan] * len(own)
            for own, values in zip(steps, found, strict=True)
        ]

    def close(self) -> None:
        """Nothing was started."""


def _cut(steps: list[Step]) -> list[str]:
    """The text of each step alone."""
    begins = [0, *(len(step.text) for step in steps)]
    return [step.text[begin:] for step, begin in zip(steps, begins, strict=False)]


class StepTask(OnlineTask):
    """One step of training: sample, score outcomes and steps, give each token the advantage of its step, update.

    Args:
        algorithm: a row of steps.
        step_reward: judges the steps.
        separator: text that ends a step.
    """

    algorithm: StepSupervised

    def __init__(self, *, step_reward: StepReward, separator: str, **options: Any) -> None:
        super().__init__(**options)
        self.step_reward, self.separator = step_reward, separator

    def close(self) -> None:
        super().close()
        self.step_reward.close()

    def sample(self, prompts: list[Prompt]) -> Rollout:
        rollout = super().sample(prompts)
        owners = [prompt for prompt, samples in zip(prompts, rollout.samples, strict=True) for _ in samples]
        with self.timed("reward"):
            steps = [steps_of(self.engine.tokenizer, sample, self.separator) for sample in rollout.flat]
            for sample, own, values in zip(rollout.flat, steps, self.step_reward(owners, steps, rollout.flat), strict=True):
                sample.step_ends, sample.step_rewards = [step.end for step in own], values
        return rollout

    def judge(self, rollout: Rollout) -> tuple[list[PolicyChunk], dict[str, float]]:
        row, samples = self.algorithm, rollout.flat
        values = torch.tensor([value for sample in samples for value in sample.step_rewards], dtype=torch.float32)
        cu_steps = offsets([len(sample.step_rewards) for sample in samples])
        estimate = DENSE_ADVANTAGES[row.dense]
        of_steps = estimate(values, cu_steps, torch.tensor(rollout.cu_groups, dtype=torch.int32), **row.dense_options)
        outcome = group_advantages(rollout, row, self.reward_weights) if row.outcome_coef else torch.zeros(len(samples))
        by_token = [
            spread(sample, of_steps[begin:end]) + row.outcome_coef * own
            for sample, begin, end, own in zip(samples, cu_steps.tolist(), cu_steps[1:].tolist(), outcome, strict=False)
        ]
        alive = torch.tensor([float(bool(own.any())) for own in by_token])
        chunks = self.chunks_of(rollout, alive)
        give_tokens(chunks, by_token)
        present = values[~torch.isnan(values)]
        told = {"steps/mean_number": len(values) / max(len(samples), 1), "rewards/steps/missing": float(len(values) - len(present))}
        return chunks, told | {"rewards/steps/mean": float(present.mean()) if len(present) else float("nan")}


def spread(sample: Sample, advantages: Tensor) -> Tensor:
    """[n] of a sample's scored tokens: each one's is that of the step it belongs to; behind the last step 0."""
    out, begin = torch.zeros(len(sample.ids)), 0
    for end, value in zip(sample.step_ends, advantages, strict=True):
        out[begin : end + 1] = value
        begin = end + 1
    return out if sample.scored is None else out[torch.tensor(sample.scored, dtype=torch.bool)]


def give_tokens(chunks: list[PolicyChunk], by_token: list[Tensor]) -> None:
    """Puts the advantages [n] of each sample's tokens into the micro-batches that hold the sample."""
    for chunk in chunks:
        assert chunk.index is not None
        chunk.advantages = torch.cat([by_token[i] for i in chunk.index.tolist()])


def offsets(counts: list[int]) -> Tensor:
    """[B+1] int32 from [B] counts."""
    return torch.tensor([0, *counts]).cumsum(0).int()
