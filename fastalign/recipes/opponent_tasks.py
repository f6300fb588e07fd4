"""Online learning from comparisons with another policy: XPO and Nash-MD."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from ..algorithms import Exploring, MixturePlay
from ..data import Prompt
from ..rollout import Rollout, Sample
from ..training.step import MicroBatch
from .online_preference import FoundPair, OnlinePreferenceTask
from .online_task import OnlineTask
from .opponents import Opponent
from .pair_objective import PairBatch
from .policy import PolicyChunk
from .scored_rollouts import score


class OpposedTask(OnlineTask):
    """Samples the opponent's completions beside the policy's, and scores both.

    Args:
        opponent: the other policy.
    """

    def __init__(self, *, opponent: Opponent, **options: Any) -> None:
        super().__init__(**options)
        self.opponent = opponent

    def sample(self, prompts: list[Prompt]) -> Rollout:
        keys = list(range(self.num_requests, self.num_requests + len(prompts)))
        with self.timed("rollout"):
            others = self.opponent.samples(prompts, self.params, keys)
        with self.timed("reward"):
            score(self.rewards, prompts, Rollout([prompt.ids for prompt in prompts], others), beside=self.sampler.weights)
        rollout = super().sample(prompts)
        rollout.opponents = others
        return rollout


class ExploringTask(OpposedTask, OnlinePreferenceTask):
    """XPO (arXiv:2405.21046, Algorithm 1): DPO of pairs (y ~ π, ỹ ~ π_ref), plus α log π(ỹ): away from what the reference says.

    The k-th completion of the policy and the k-th of the reference are a pair, where their rewards differ.
    """

    algorithm: Exploring

    def find_pairs(self, rollout: Rollout) -> list[FoundPair]:
        found = []
        for prompt, own, others in zip(rollout.prompts, rollout.samples, rollout.opponents, strict=True):
            for mine, other in zip(own, others, strict=True):
                rewards = mine.reward(self.reward_weights), other.reward(self.reward_weights)
                if rewards[0] > rewards[1]:
                    found.append(FoundPair(prompt, mine, other, of_reference=1))
                elif rewards[0] < rewards[1]:
                    found.append(FoundPair(prompt, other, mine, of_reference=0))
        return found

    def micro_batch(self, batch: PairBatch, pairs: list[FoundPair]) -> MicroBatch:
        explored = [2 * place + pairs[i].of_reference for place, i in enumerate(batch.members.tolist())]
        return with_exploration(super().micro_batch(batch, pairs), explored, self.algorithm.exploration_coef / len(pairs))


def with_exploration(batch: MicroBatch, sequences: list[int], coefficient: float) -> MicroBatch:
    """The batch's objective, and coefficient · Σ log π of the tokens of some of its sequences."""
    lengths = batch.packed.cu_targets.diff().long()
    chosen = torch.zeros(len(lengths)).index_fill(0, torch.tensor(sequences, dtype=torch.long), 1.0)
    weights = torch.repeat_interleave(chosen.to(lengths.device), lengths)

    def objective(logp: Tensor, entropy: Tensor, span: slice):
        loss, sums = cast(tuple[Tensor, dict[str, Tensor]], batch.objective(logp, entropy, span))
        explored = (weights[span].to(logp) * logp).sum()
        return loss + coefficient * explored, sums | {"logps/reference_samples": explored.detach()}

    return replace(batch, objective=objective)


class MixtureTask(OpposedTask):
    """Nash-MD (arXiv:2312.00886, section 7): the policy gradient of P(y ≻ y') - 1/2 - τ log π(y) / π_ref(y), y' of the mixture.

    P is σ(r(y) - r(y')), and every completion is compared with all of its prompt's opponents. The log-ratio is the whole
    sequence's, as in the paper; TRL multiplies it token by token, which leaves out what an early token does to later ones.
    """

    algorithm: MixturePlay

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.row = self.algorithm
        self.algorithm = replace(self.row, kl_coef=0.0)  # the KL is in the advantage

    def judge(self, rollout: Rollout) -> tuple[list[PolicyChunk], dict[str, float]]:
        chances = torch.tensor(
            [self._preferred(sample, others) for own, others in zip(rollout.samples, rollout.opponents, strict=True) for sample in own],
            dtype=torch.float32,
        )
        chunks = self.chunks_of(rollout, torch.ones(len(rollout.flat)))
        total = count = 0.0
        for chunk in chunks:
            assert self.reference is not None
            with self.timed("reference"):
                chunk.ref_logp = self.reference.score(chunk.packed, temperature=self.params.temperature)
            lengths = chunk.packed.cu_targets.cpu().diff().long()
            owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
            gap = chunk.sampler_logp.double() - chunk.ref_logp.double().cpu()
            ratios = torch.zeros(len(lengths), dtype=torch.float64).index_add_(0, owner, gap)
            advantages = (chances[chunk.index] - 0.5 - self.row.kl_coef * ratios).nan_to_num(0.0).float()  # without a reward: 0
            chunk.advantages = advantages[owner]
            total, count = total + float(gap.sum()), count + len(gap)
        known = chances[~torch.isnan(chances)]
        told = {"kl": total / max(count, 1), "opponent/preferred": float(known.mean()) if len(known) else math.nan}
        return chunks, told

    def _preferred(self, sample: Sample, others: list[Sample]) -> float:
        """How probably a completion is preferred to an opponent's, on average; NaN where a reward is missing."""
        own = sample.reward(self.reward_weights)
        rewards = [reward for other in others if not math.isnan(reward := other.reward(self.reward_weights))]
        if math.isnan(own) or not rewards:
            return math.nan
        return math.fsum(1 / (1 + math.exp(min(reward - own, 700.0))) for reward in rewards) / len(rewards)
