"""From a scored rollout to the micro-batches of a policy update: advantages, token weights, objective.

Nothing here knows an algorithm by name: the row says which advantage, loss, aggregation and KL to call.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..advantages import ADVANTAGES
from ..algorithms import Algorithm
from ..losses.policy import KL, POLICY, token_weights
from ..packing import Packed, pack, split_by_tokens
from ..rollout import Rollout
from ..training.step import MicroBatch


@dataclass
class PolicyChunk:
    """A micro-batch of a rollout with the numbers of its objective, one a scored token, [N] fp32.

    Attributes:
        packed: the token tree.
        advantages: the advantage of each token's sequence.
        weights: each token's weight in the scalar loss; global divisors inside.
        sampler_logp: log-probs of the model at the sampling temperature, as the engine saw them.
        ref_logp: the reference's, or None without a KL term.
        old_logp: those of the policy that sampled, or None while the policy *is* that policy.
    """

    packed: Packed
    advantages: Tensor
    weights: Tensor
    sampler_logp: Tensor
    ref_logp: Tensor | None = None
    old_logp: Tensor | None = None


def group_advantages(rollout: Rollout, algorithm: Algorithm, reward_weights: dict[str, float]) -> Tensor:
    """[B] advantages of the rollout's samples, in the order of `rollout.flat`."""
    rewards = torch.tensor([sample.reward(reward_weights) for sample in rollout.flat], dtype=torch.float32)
    cu_groups = torch.tensor(rollout.cu_groups, dtype=torch.int32)
    return ADVANTAGES[algorithm.advantage](rewards, cu_groups, **algorithm.advantage_options)


def build_chunks(rollout: Rollout, advantages: Tensor, algorithm: Algorithm, *, budget: int, max_tokens: int) -> list[PolicyChunk]:
    """Cuts a rollout into micro-batches of at most `max_tokens` forwarded tokens, groups whole.

    Groups without any advantage are not forwarded when there is no KL: their gradient is exactly zero. They still count
    in the divisors, so the loss is that of the whole batch.

    Args:
        advantages: [B].
        budget: tokens that a completion may have (the divisor of "budget" aggregation).
    """
    lengths = torch.tensor([_num_scored(s) for s in rollout.flat])
    bounds, trees = rollout.cu_groups, rollout.trees()
    live = [p for p in range(len(trees)) if algorithm.kl_coef > 0 or bool((advantages[bounds[p] : bounds[p + 1]] != 0).any())]
    chunks = []
    for members in split_by_tokens([trees[p] for p in live], max_tokens):
        groups = [live[i] for i in members]
        index = torch.cat([torch.arange(bounds[p], bounds[p + 1]) for p in groups])
        packed = pack([trees[p] for p in groups])
        weights = token_weights(
            algorithm.aggregate, lengths[index], num_tokens=int(lengths.sum()), num_sequences=len(lengths), budget=budget
        )
        own = torch.repeat_interleave(advantages[index], lengths[index])
        chunks.append(PolicyChunk(packed, own, weights, _sampler_logp(rollout, groups)))
    return chunks


def _num_scored(sample) -> int:
    return len(sample.ids) if sample.scored is None else sum(sample.scored)


def _sampler_logp(rollout: Rollout, groups: Sequence[int]) -> Tensor:
    values: list[float] = []
    for p in groups:
        for sample in rollout.samples[p]:
            logp = torch.tensor(sample.logprobs, dtype=torch.float64)
            if sample.kept_mass is not None:  # undo the truncation: the trainer's distribution is not truncated
                logp = logp + torch.tensor(sample.kept_mass, dtype=torch.float64).log()
            kept = logp if sample.scored is None else logp[torch.tensor(sample.scored)]
            values.extend(kept.tolist())
    return torch.tensor(values, dtype=torch.float32)


def _clip_range(algorithm: Algorithm) -> tuple[float, float] | None:
    defaults = inspect.signature(POLICY[algorithm.loss].function).parameters
    if "epsilon" not in defaults:
        return None
    options = {name: defaults[name].default for name in ("epsilon", "epsilon_high")} | dict(algorithm.loss_options)
    high = options["epsilon"] if options["epsilon_high"] is None else options["epsilon_high"]
    return 1 - options["epsilon"], 1 + high


def micro_batch(chunk: PolicyChunk, algorithm: Algorithm) -> MicroBatch:
    """The chunk's objective: the row's policy loss plus its KL, weighted and summed."""
    row, clip_range = POLICY[algorithm.loss], _clip_range(algorithm)
    units = chunk.packed.cu_targets if row.unit == "sequence" else None

    def objective(logp: Tensor, entropy: Tensor, span: slice):
        old = logp.detach() if chunk.old_logp is None else chunk.old_logp[span]
        cu_targets = _local_offsets(chunk.packed.cu_targets, span)
        advantages, weights = chunk.advantages[span], chunk.weights[span]
        loss = row.function(logp, old, advantages, cu_targets, **algorithm.loss_options)
        sums = {}
        if clip_range is not None:
            ratio = _ratio(logp.detach() - old, cu_targets, row.unit)
            sums["clip_low"] = ((ratio < clip_range[0]) & (advantages < 0)).float().sum()
            sums["clip_high"] = ((ratio > clip_range[1]) & (advantages > 0)).float().sum()
        if chunk.ref_logp is not None:
            kl = KL[algorithm.kl](logp, chunk.ref_logp[span])
            sums["kl"] = kl.detach().sum()
            loss = loss + algorithm.kl_coef * kl
        return (weights * loss).sum(), sums

    return MicroBatch(chunk.packed, objective, units)


def _ratio(log_ratio: Tensor, cu_targets: Tensor, unit: str) -> Tensor:
    """The importance ratio that the loss clips: each token's own, or its sequence's (exp of the mean log-ratio)."""
    if unit == "token":
        return log_ratio.exp()
    lengths = cu_targets.diff().long().to(log_ratio.device)
    index = torch.repeat_interleave(torch.arange(lengths.numel(), device=log_ratio.device), lengths)
    total = log_ratio.new_zeros(lengths.numel()).index_add(0, index, log_ratio)
    return (total / lengths.clamp(min=1)).exp()[index]


def _local_offsets(cu_targets: Tensor, span: slice) -> Tensor:
    inside = cu_targets[(cu_targets > span.start) & (cu_targets < span.stop)]
    ends = cu_targets.new_tensor([span.start]), cu_targets.new_tensor([span.stop])
    return torch.cat([ends[0], inside, ends[1]]) - span.start
