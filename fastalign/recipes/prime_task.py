"""PRIME: a language model learns from outcomes beside the policy, and its log-ratios are the rewards of single tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..advantages import DENSE_ADVANTAGES
from ..algorithms import ImplicitReward
from ..packing import Packed
from ..rollout import Rollout
from ..training.step import MicroBatch, Updater
from .online_task import OnlineTask
from .policy import PolicyChunk, group_advantages
from .reference import Reference
from .step_task import give_tokens, offsets


def outcome_objective(packed: Packed, ref_logp: Tensor, labels: Tensor, *, beta: float, count: int) -> MicroBatch:
    """Cross-entropy of σ(β Σ_t log π / π_ref) against each sequence's outcome (arXiv:2502.01456, Eq. 4).

    Args:
        ref_logp: [N] of the packed targets.
        labels: [B] 1 right, 0 wrong, NaN unknown (left out).
        count: sequences of the whole batch with a label: the divisor.
    """
    cu_targets = packed.cu_targets

    def objective(logp: Tensor, entropy: Tensor, span: slice):
        rows = torch.arange(span.start, span.stop, device=logp.device)
        owner = torch.searchsorted(cu_targets[1:].to(logp.device).long(), rows, right=True)
        ratio = torch.zeros(len(labels), dtype=logp.dtype, device=logp.device).index_add(0, owner, logp - ref_logp[span].to(logp))
        own = labels.to(logp)
        seen = torch.zeros_like(own, dtype=torch.bool).index_fill(0, owner, True) & ~torch.isnan(own)
        score = beta * ratio
        loss = F.binary_cross_entropy_with_logits(score, own.nan_to_num(), reduction="none")
        right = ((score > 0) == (own > 0.5)) & seen
        return torch.where(seen, loss, 0.0).sum() / count, {"right": right.sum()}

    return MicroBatch(packed, objective, cu_targets)


class ImplicitRewardModel:
    """A causal language model whose log-ratio to where it began is a reward, and its optimizer.

    Args:
        updater: of the model.
        reference: the model as it began.
        beta: nats to reward.
    """

    def __init__(self, updater: Updater, reference: Reference, *, beta: float) -> None:
        self.updater, self.reference, self.beta = updater, reference, beta

    def update(self, chunks: list[PolicyChunk], labels: Tensor) -> tuple[list[Tensor], dict[str, float]]:
        """One step towards the outcomes; the rewards are those of its forward, so the tokens are forwarded once.

        Args:
            labels: [B] of the rollout's samples: 1 right, 0 wrong, NaN unknown.

        Returns:
            one [N] fp32 of token rewards a chunk, on the CPU; metrics.
        """
        refs = [self.reference.score(chunk.packed) for chunk in chunks]
        count = max(int((~torch.isnan(labels)).sum()), 1)
        batches = [
            outcome_objective(chunk.packed, ref, labels[chunk.index], beta=self.beta, count=count)
            for chunk, ref in zip(chunks, refs, strict=True)
        ]
        rate = self.updater.schedule.get_last_lr()[0]
        result = self.updater.update(batches)
        rewards = [self.beta * (logp - ref.to(logp)).float().cpu() for logp, ref in zip(result.logps, refs, strict=True)]
        told = {"prm/loss": result.loss, "prm/accuracy": result.sums.get("right", math.nan) / count}
        return rewards, told | {"prm/grad_norm": result.grad_norm, "prm/learning_rate": rate}


class PrimeTask(OnlineTask):
    """One step of training: sample, score outcomes, update the model of rewards, give each token its advantage, update the policy.

    Args:
        prm: the model of rewards.
    """

    algorithm: ImplicitReward

    def __init__(self, *, prm: ImplicitRewardModel, **options: Any) -> None:
        super().__init__(**options)
        self.prm = prm

    def judge(self, rollout: Rollout) -> tuple[list[PolicyChunk], dict[str, float]]:
        row, samples = self.algorithm, rollout.flat
        scores = torch.tensor([sample.reward(self.reward_weights) for sample in samples], dtype=torch.float32)
        labels = torch.where(torch.isnan(scores), scores, (scores > row.prm_threshold).float())
        chunks = self.chunks_of(rollout, torch.ones(len(samples)))
        with self.timed("prm"):
            rewards, told = self.prm.update(chunks, labels)
        by_sample: list[Tensor] = [torch.zeros(0)] * len(samples)
        for chunk, values in zip(chunks, rewards, strict=True):
            assert chunk.index is not None
            for i, own in zip(chunk.index.tolist(), values.split(chunk.packed.cu_targets.diff().tolist()), strict=True):
                by_sample[i] = own
        broken = [sample.finish_reason == "abort" for sample in samples]  # no rewards: no part of the others' baseline
        judged = [own[:0] if off else own for own, off in zip(by_sample, broken, strict=True)]
        lengths, flat = [len(own) for own in judged], torch.cat([torch.zeros(0), *judged])
        cu_groups = torch.tensor(rollout.cu_groups, dtype=torch.int32)
        dense = DENSE_ADVANTAGES[row.dense](flat, offsets(lengths), cu_groups, **row.dense_options)
        outcome = group_advantages(rollout, row, self.reward_weights)
        advantages = [own + row.outcome_coef * value for own, value in zip(dense.split(lengths), outcome, strict=True)]
        give_tokens(chunks, [torch.zeros_like(all_) if off else own for own, all_, off in zip(advantages, by_sample, broken, strict=True)])
        return chunks, told | {"rewards/implicit/mean": float(flat.mean()) if len(flat) else math.nan}
