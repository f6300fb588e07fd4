"""From a scored rollout to the micro-batches of a policy update: advantages, token weights, objective.

Nothing here knows an algorithm by name: the row says which advantage, loss, aggregation and KL to call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..advantages import ADVANTAGES, READS
from ..algorithms import Algorithm
from ..losses.policy import POLICY, token_weights
from ..models.recorded import Replay
from ..ops.policy import PolicyOptions, policy_loss
from ..packing import Packed, pack, split_by_tokens
from ..rollout import Rollout
from ..staging import Traveller
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
        index: [b] which samples of the rollout these are.
        nll_weights: what each token's NLL counts beside the policy loss, or None.
        values: the critic's at sampling time; returns: what they are to become. None without a critic.
        recorded: [T] int64, the row that each token of the tree has in a recording of the rollout's forward passes; None without one.
    """

    packed: Packed
    advantages: Tensor
    weights: Tensor
    sampler_logp: Tensor
    ref_logp: Tensor | None = None
    old_logp: Tensor | None = None
    index: Tensor | None = None
    nll_weights: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None
    recorded: Tensor | None = None


def group_advantages(rollout: Rollout, algorithm: Algorithm, reward_weights: dict[str, float]) -> Tensor:
    """[B] advantages of the rollout's samples, in the order of `rollout.flat`."""
    rewards = torch.tensor([sample.reward(reward_weights) for sample in rollout.flat], dtype=torch.float32)
    cu_groups = torch.tensor(rollout.cu_groups, dtype=torch.int32)
    given, reads = {}, READS.get(algorithm.advantage)
    if reads == "lengths":
        given[reads] = torch.tensor([sample.num_scored for sample in rollout.flat])
    elif reads == "greedy":
        given[reads] = torch.tensor([sample.reward(reward_weights) for sample in rollout.greedy], dtype=torch.float32)
    return ADVANTAGES[algorithm.advantage](rewards, cu_groups, **given, **algorithm.advantage_options)


def build_chunks(rollout: Rollout, advantages: Tensor, algorithm: Algorithm, *, budget: int, max_tokens: int) -> list[PolicyChunk]:
    """Cuts a rollout into micro-batches of at most `max_tokens` forwarded tokens, groups whole.

    Samples that cannot have a gradient (`has_gradient`) are not forwarded, nor are prompts that have no others. They still count in
    the divisors, so the loss is that of the whole batch.

    Args:
        advantages: [B].
        budget: tokens that a completion may have (the divisor of "budget" aggregation).
    """
    lengths, alive = torch.tensor([s.num_scored for s in rollout.flat]), has_gradient(advantages, algorithm)
    kept = only(rollout, alive.tolist())
    index, bounds, trees = alive.nonzero().squeeze(1), kept.cu_groups, kept.trees()
    chunks = []
    for groups in split_by_tokens(trees, max_tokens):
        own = index[torch.cat([torch.arange(bounds[p], bounds[p + 1]) for p in groups])]
        weights = token_weights(algorithm.aggregate, lengths[own], num_tokens=int(lengths.sum()), num_sequences=len(lengths), budget=budget)
        by_token = torch.repeat_interleave(advantages[own], lengths[own])
        packed = pack([trees[p] for p in groups], forward_last=False)
        sampler_logp, recorded = _sampler_logp(kept, groups), _recorded(kept, groups)
        chunks.append(PolicyChunk(packed, by_token, weights, sampler_logp, index=own, recorded=recorded))
    return chunks


def only(rollout: Rollout, keep: Sequence[bool]) -> Rollout:
    """The rollout of the samples that are kept, without the prompts that keep none."""
    flags = iter(keep)
    samples = [[sample for sample in group if next(flags)] for group in rollout.samples]
    kept = [p for p, group in enumerate(samples) if group]
    columns = [rollout.columns[p] for p in kept] if rollout.columns else []
    return Rollout([rollout.prompts[p] for p in kept], [samples[p] for p in kept], columns)


def has_gradient(advantages: Tensor, algorithm: Algorithm) -> Tensor:
    """Which advantages [B] can give their sequence a gradient: all with a KL or entropy term, else those that the row's loss reads."""
    if algorithm.kl_coef > 0 or algorithm.entropy_coef != 0:
        return torch.ones_like(advantages, dtype=torch.bool)
    return advantages > 0 if POLICY[algorithm.loss].positive_only else advantages != 0


def _sampler_logp(rollout: Rollout, groups: Sequence[int]) -> Tensor:
    values: list[float] = []
    for p in groups:
        for sample in rollout.samples[p]:
            logp = torch.tensor(sample.logprobs, dtype=torch.float64)
            if sample.kept_mass is not None:  # undo the truncation: the trainer's distribution is not truncated
                logp = logp + torch.tensor(sample.kept_mass, dtype=torch.float64).log()
            kept = logp if sample.scored is None else logp[torch.tensor(sample.scored, dtype=torch.bool)]
            values.extend(kept.tolist())
    return torch.tensor(values, dtype=torch.float32)


def _recorded(rollout: Rollout, groups: Sequence[int]) -> Tensor | None:
    """[T] rows of a recording, in the order of the groups' trees; None where no token has one."""
    rows: list[np.ndarray] = []
    for p in groups:
        start = len(rollout.prompts[p])
        known = [sample.recorded for sample in rollout.samples[p] if sample.recorded is not None]
        rows.append(_padded(known[0][:start] if known else [], start))
        for sample in rollout.samples[p]:  # the last token was drawn, and is forwarded by nobody
            rows.append(_padded(sample.recorded[start:] if sample.recorded is not None else [], max(0, len(sample.ids) - 1)))
    found = torch.from_numpy(np.concatenate(rows)) if rows else torch.empty(0, dtype=torch.int64)
    return found if bool((found >= 0).any()) else None


def _padded(rows: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
    """int64 [length], -1 behind the rows."""
    out = np.full(length, -1, np.int64)
    out[: len(rows)] = rows[:length]
    return out


def terms_of(algorithm: Algorithm) -> PolicyOptions:
    """What the row adds to its policy loss: KL, entropy, correction."""
    return PolicyOptions(algorithm.kl, algorithm.kl_coef, algorithm.entropy_coef, **algorithm.correction_options)


def micro_batch(chunk: PolicyChunk, algorithm: Algorithm, replay: Replay | None = None) -> MicroBatch:
    """The chunk's objective: the row's policy loss plus its KL and entropy, weighted and summed, in one launch.

    Args:
        replay: what is known of the policy's forward pass.
    """
    terms, cu_targets = terms_of(algorithm), chunk.packed.cu_targets
    if chunk.ref_logp is None:
        terms = replace(terms, kl_coef=0.0)
    couples = POLICY[algorithm.loss].unit == "sequence" or terms.correction.startswith("sequence")
    sampler_logp = None if terms.correction == "none" else chunk.sampler_logp
    columns = Traveller(chunk.advantages, chunk.weights, chunk.old_logp, chunk.ref_logp, sampler_logp, chunk.nll_weights)

    def objective(logp: Tensor, entropy: Tensor, span: slice):
        own = [None if column is None else column[span] for column in columns.at(logp.device)]
        advantages, weights, old_logp, ref_logp, sampler_logp, nll_weights = own
        loss, sums = policy_loss(
            logp,
            old_logp,
            advantages,
            weights,
            loss=algorithm.loss,
            cu_targets=_local_offsets(cu_targets, span) if couples else None,
            ref_logp=ref_logp,
            sampler_logp=sampler_logp,
            entropy=entropy if terms.entropy_coef else None,
            options=terms,
            **algorithm.loss_options,
        )
        return loss if nll_weights is None else loss - (nll_weights * logp).sum(), sums

    return MicroBatch(chunk.packed, objective, cu_targets if couples else None, replay=replay)


def _local_offsets(cu_targets: Tensor, span: slice) -> Tensor:
    inside = cu_targets[(cu_targets > span.start) & (cu_targets < span.stop)]
    ends = cu_targets.new_tensor([span.start]), cu_targets.new_tensor([span.stop])
    return torch.cat([ends[0], inside, ends[1]]) - span.start
