"""The actor-critic task: token rewards and values → advantages of every token → updates of critic and policy."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..advantages import TOKEN_ADVANTAGES
from ..algorithms import ActorCritic
from ..rollout import Rollout
from ..training.step import Update
from .critic import Critic
from .online_task import OnlineTask, log
from .policy import PolicyChunk, build_chunks, only


class PPOTask(OnlineTask):
    """One step: sample, score, judge every token by its advantage, update the critic and, after its warm-up, the policy.

    Args:
        critic: the values.
        weights_mb: MiB of all weights that the run holds, each once; told in every row.
        algorithm: a row of `ACTOR_CRITICS`.
    """

    algorithm: ActorCritic

    def __init__(self, *, critic: Critic, algorithm: ActorCritic, weights_mb: float = math.nan, **options: Any) -> None:
        super().__init__(algorithm=algorithm, **options)
        self.critic, self.row, self.weights_mb = critic, algorithm, weights_mb
        self.kl_coef = algorithm.kl_coef
        self.seen = Running()

    def step(self, index: int) -> dict[str, float]:
        self.timing.clear()
        self.updates_policy = index >= self.row.critic_warmup
        sampled = self.next_rollout(index)
        rollout = self._with_rewards(sampled)
        every_token = torch.ones(len(rollout.flat))
        chunks = build_chunks(rollout, every_token, self.row, budget=self.params.max_tokens, max_tokens=self.max_tokens)
        if self.reference is not None:
            with self.timed("reference"):
                for chunk in chunks:
                    chunk.ref_logp = self.reference.score(chunk.packed, temperature=self.params.temperature)
        with self.timed("critic"):
            for chunk in chunks:
                chunk.values = self.critic.values(chunk)
        told = self._judge(rollout, chunks)
        # the KL is in the rewards, or in the loss at what its coefficient is by now
        self.algorithm = replace(self.row, kl_coef=self.kl_coef if self.row.kl_in == "loss" else 0.0)
        with self.timed("critic"):
            learned = [self.critic.update(chunks)[1] for _ in range(self.num_iterations)]
        with self.timed("update"):
            if self.updates_policy:
                updates = [self.update(chunks, first=i == 0) for i in range(self.num_iterations)]
            else:
                updates = [self._not_yet()]
        if self.updates_policy:  # before, the policy is the reference, whatever the coefficient
            self._steer(told["objective/kl"], len(rollout.flat))
        return self.metrics(sampled, chunks, updates) | told | learned[0]

    def _with_rewards(self, rollout: Rollout) -> Rollout:
        """The samples that have a reward: the others would teach the critic nothing true."""
        keep = [not math.isnan(sample.reward(self.reward_weights)) for sample in rollout.flat]
        if all(keep):
            return rollout
        log.warning("%d of %d samples have no reward and are left out", keep.count(False), len(keep))
        return only(rollout, keep)

    def _judge(self, rollout: Rollout, chunks: list[PolicyChunk]) -> dict[str, float]:
        """Fills in every chunk's advantages and returns; what was seen on the way."""
        given = torch.tensor([sample.reward(self.reward_weights) for sample in rollout.flat], dtype=torch.float32)
        scores = self._shaped(given)
        kl = torch.zeros(len(given))
        for chunk in chunks:
            cu = chunk.packed.cu_targets.cpu().to(torch.int32)
            rewards = torch.zeros(int(cu[-1]))
            if chunk.ref_logp is not None:
                gap = chunk.sampler_logp - chunk.ref_logp.float().cpu()
                kl[chunk.index] = _sums(gap, cu)
                if self.row.kl_in == "reward":
                    rewards -= self.kl_coef * gap
            scored = cu.diff() > 0
            rewards[cu[1:][scored].long() - 1] += scores[chunk.index][scored]
            estimate = TOKEN_ADVANTAGES[self.row.advantage]
            assert chunk.values is not None
            chunk.advantages, chunk.returns = estimate(rewards, chunk.values, cu, **self.row.advantage_options)
            if self.row.nll_coef:
                chunk.nll_weights = torch.repeat_interleave((given[chunk.index] > 0).float(), cu.diff().long())
        if self.row.whiten and chunks:
            _whiten([chunk.advantages for chunk in chunks])
        if self.row.nll_coef:
            positive = max(sum(float(c.nll_weights.sum()) for c in chunks if c.nll_weights is not None), 1.0)
            for chunk in chunks:
                assert chunk.nll_weights is not None
                chunk.nll_weights *= self.row.nll_coef / positive
        mean_kl, mean_score = (float(x.mean()) if len(x) else 0.0 for x in (kl, given))
        told = {"objective/scores": mean_score}
        if self.reference is not None:
            told |= {"objective/rlhf_reward": mean_score - self.kl_coef * mean_kl, "objective/kl_coef": self.kl_coef}
        return {"objective/kl": mean_kl, "memory/weights_mb": self.weights_mb, **told}

    def _shaped(self, scores: Tensor) -> Tensor:
        if self.row.normalize_rewards and len(scores):
            self.seen.add(scores)
            scores = (scores - self.seen.mean) / max(self.seen.deviation, 1e-8)
        return scores.clamp(-self.row.reward_clip, self.row.reward_clip) if self.row.reward_clip else scores

    def _steer(self, kl: float, samples: int) -> None:
        """Ziegler et al. (arXiv:1909.08593), section 2.2: the coefficient moves by at most a fifth of samples / horizon."""
        if self.row.kl_target:
            error = min(max(kl / self.row.kl_target - 1, -0.2), 0.2)
            self.kl_coef *= 1 + error * samples / self.row.kl_horizon

    def _not_yet(self) -> Update:
        """No update of the policy while the critic warms up; its schedule waits, too."""
        rate = self.updater.schedule.get_last_lr()[0]
        return Update(math.nan, math.nan, {"learning_rate": rate}, [], applied=True)

    def state_dict(self) -> dict:
        return super().state_dict() | {"kl_coef": self.kl_coef, "scores": vars(self.seen).copy()}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.kl_coef = state["kl_coef"]
        self.seen = Running(**state["scores"])


class Running:
    """Count, mean and sum of squared deviations of all that was added (Chan et al. 1979)."""

    def __init__(self, count: float = 0.0, mean: float = 0.0, squares: float = 0.0) -> None:
        self.count, self.mean, self.squares = count, mean, squares

    def add(self, values: Tensor) -> None:
        """Takes in [B] values."""
        own, mean = float(len(values)), float(values.double().mean())
        gap, total = mean - self.mean, self.count + own
        self.squares += float((values.double() - mean).square().sum()) + gap**2 * self.count * own / total
        self.mean += gap * own / total
        self.count = total

    @property
    def deviation(self) -> float:
        """The standard deviation; 1 of fewer than two values."""
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 1.0


def _sums(values: Tensor, cu: Tensor) -> Tensor:
    """[B] sums of runs."""
    owner = torch.repeat_interleave(torch.arange(len(cu) - 1), cu.diff().long())
    return torch.zeros(len(cu) - 1).index_add_(0, owner, values)


def _whiten(parts: list[Tensor]) -> None:
    """To mean 0 and deviation 1 over all parts, in place; equal values become 0."""
    whole = torch.cat(parts).double()
    if not whole.numel():
        return
    mean, deviation = whole.mean(), whole.std() if whole.numel() > 1 else whole.new_zeros(())
    same = bool(whole.max() == whole.min())
    for part in parts:
        part.copy_(torch.zeros_like(part) if same else (part.double() - mean) / (deviation + 1e-8))
