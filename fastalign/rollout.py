"""Rollout: what sampling hands to training, whichever engine sampled."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .packing import Segment, group


@dataclass
class Sample:
    """One completion.

    Attributes:
        ids: its token ids, stop token included.
        logprobs: nats, of the distribution that was sampled (temperature and truncation applied).
        raw_logprobs: nats, of the model at temperature 1 with no truncation.
        kept_mass: probability that top-k, top-p and min-p left, a token; None when nothing was truncated.
        weight_versions: the engine's weight version at each token.
        finish_reason: "stop" | "length" | "abort".
        scored: one flag a token; False for tokens that an environment wrote. None: all scored.
        text: the completion as text, without the stop string.
        rewards: by name; NaN where the reward is missing.
        turns: how often the model had its say; more than once only with an environment.
        total: what the rewards come to, where they are not simply added; None: their weighted sum.
        unshaped: the total without what only shapes another reward (DAPO's overlong punishment); None: the total.
        recorded: [prompt and completion, less the last token] the row that each token has in a recording of the forward passes
            (`Engine.recording`), -1 for none; None without one.
        step_ends, step_rewards: the last token of each step and the step's reward, where steps are judged; NaN where one is missing.
    """

    ids: list[int]
    logprobs: list[float]
    raw_logprobs: list[float]
    kept_mass: list[float] | None = None
    weight_versions: list[int] | None = None
    finish_reason: str = "stop"
    scored: list[bool] | None = None
    text: str = ""
    rewards: dict[str, float] = field(default_factory=dict)
    turns: int = 1
    total: float | None = None
    unshaped: float | None = None
    step_ends: list[int] = field(default_factory=list)
    step_rewards: list[float] = field(default_factory=list)
    recorded: NDArray[np.int64] | None = field(default=None, compare=False, repr=False)

    @property
    def num_scored(self) -> int:
        """Tokens that the model wrote."""
        return len(self.ids) if self.scored is None else sum(self.scored)

    def reward(self, weights: dict[str, float]) -> float:
        """The total, or the weighted sum of the rewards that exist; NaN when none does."""
        if self.total is not None:
            return self.total
        found = [weights[name] * value for name, value in self.rewards.items() if not math.isnan(value)]
        return sum(found) if found else math.nan

    def unshaped_reward(self, weights: dict[str, float]) -> float:
        """The reward before shaping: whether a group's samples differ in more than their lengths."""
        return self.reward(weights) if self.unshaped is None else self.unshaped


@dataclass
class Rollout:
    """Prompts and their samples; groups may be ragged.

    Attributes:
        prompts: token ids, one list a group.
        samples: the completions of each prompt.
        columns: every other column of the prompts' records, for the rewards.
        greedy: the most probable completion of each prompt, where the advantage reads its reward; else empty.
        opponents: another policy's completions of each prompt, where the algorithm compares with them; else empty.
    """

    prompts: list[list[int]]
    samples: list[list[Sample]]
    columns: list[dict] = field(default_factory=list)
    greedy: list[Sample] = field(default_factory=list)
    opponents: list[list[Sample]] = field(default_factory=list)

    @property
    def flat(self) -> list[Sample]:
        """All samples, group by group: the [B] order of advantages and of `Packed.cu_targets`."""
        return [sample for samples in self.samples for sample in samples]

    @property
    def cu_groups(self) -> list[int]:
        """[P+1] offsets of the groups in `flat`."""
        bounds = [0]
        for samples in self.samples:
            bounds.append(bounds[-1] + len(samples))
        return bounds

    def trees(self) -> list[Segment]:
        """One token tree a prompt, ready for `pack`."""
        return [
            group(prompt, [s.ids for s in samples], [s.scored or [True] * len(s.ids) for s in samples])
            for prompt, samples in zip(self.prompts, self.samples, strict=True)
        ]
