"""The fastalign side of the policy comparison: the row that a command line names, and the chunks and updater that its task has."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .policy_batch import MAX_COMPLETION_LENGTH, NUM_GENERATIONS, Batch, Found


@dataclass
class Policy:
    """The models, loaded once for all cases."""

    loaded: Any
    old: Any
    reference: Any
    updater: Any = None


def load_policy(options: dict[str, Any]) -> Policy:
    """The policy, the model that sampled and the reference."""
    from fastalign.recipes.arguments import ModelArguments
    from fastalign.recipes.setup import load

    def loaded(name: str) -> Any:
        return load(ModelArguments(options[name], "float32", options["tokenizer"], device=options["device"]))

    return Policy(loaded("model"), loaded("old").model, loaded("reference").model)


def measure(flags: str, batch: Batch, policy: Policy, options: dict[str, Any], *, engine: bool, kl_in_reward: float) -> Found:
    """Loss, metrics, advantages and gradients of one batch, of the row that the flags of `fastalign grpo` name.

    Args:
        engine: the sampled log-probs are not the old policy's but the reference's. Where they are the old policy's and the row corrects
            for them, this is a first iteration, whose ratio is 1 but for that correction.
        kl_in_reward: the rewards are given less this times the log-ratio of sampler and reference.
    """
    from fastalign.recipes.flags import build, parse
    from fastalign.recipes.online import algorithm_of
    from fastalign.recipes.policy import build_chunks, group_advantages, micro_batch
    from fastalign.recipes.setup import build_updater
    from fastalign.training.step import score

    fixed = f"--num_generations {NUM_GENERATIONS} --max_completion_length {MAX_COMPLETION_LENGTH} --max_tokens_per_micro_batch 128"
    args = build("grpo", parse("grpo", f"{flags} {fixed} --learning_rate {options['learning_rate']}".split()))
    algorithm, rollout = algorithm_of(args), rollout_of(batch)
    if kl_in_reward:
        penalize(rollout, policy, kl_in_reward)
    advantages = group_advantages(rollout, algorithm, {"given": 1.0})
    budget, most = args.sampling.max_completion_length, args.batch.max_tokens_per_micro_batch
    chunks = build_chunks(rollout, advantages, algorithm, budget=budget, max_tokens=most)
    for chunk in chunks:
        chunk.sampler_logp = score(policy.reference if engine else policy.old, chunk.packed)
        first = algorithm.correction_options.get("correction", "none") != "none" and not engine
        chunk.old_logp = None if first else score(policy.old, chunk.packed)
        chunk.ref_logp = score(policy.reference, chunk.packed) if algorithm.reads_reference else None
    policy.updater = policy.updater or build_updater(policy.loaded, args, 1)
    result = policy.updater.accumulate([micro_batch(chunk, algorithm) for chunk in chunks])
    gradients = {name: p.grad.detach().clone() for name, p in policy.loaded.model.named_parameters()}
    return Found(result.loss, metrics_of(result.sums), advantages.tolist(), gradients)


def penalize(rollout: Any, policy: Policy, coefficient: float) -> None:
    """Takes the KL to the reference off every reward: the sum of log π_old / π_ref over the completion."""
    from fastalign.packing import pack
    from fastalign.training.step import score

    packed = pack(rollout.trees())
    log_ratio = score(policy.old, packed) - score(policy.reference, packed)
    for sample, own in zip(rollout.flat, log_ratio.split(packed.cu_targets.diff().tolist()), strict=True):
        sample.rewards["given"] -= coefficient * float(own.double().sum())


def metrics_of(sums: dict[str, float]) -> dict[str, float]:
    """A token's mean of each sum, by the names of the run's metrics."""
    low, high, targets = sums["clip_low"], sums["clip_high"], sums["targets"]
    return {
        "clip_ratio/low_mean": low / targets,
        "clip_ratio/high_mean": high / targets,
        "clip_ratio/region_mean": (low + high) / targets,
        "entropy": sums["entropy"] / targets,
        "kl": sums.get("kl", math.nan) / targets,
        "sampling/importance_sampling_ratio/mean": sums.get("correction", math.nan) / targets,
    }


def rollout_of(batch: Batch) -> Any:
    """The batch as if an engine had sampled it."""
    from fastalign.rollout import Rollout, Sample

    def sample(ids: list[int], reward: float) -> Sample:
        return Sample(ids, [0.0] * len(ids), [0.0] * len(ids), rewards={"given": reward})

    pairs = zip(batch.completions, batch.rewards, strict=True)
    return Rollout(batch.prompts, [[sample(*both) for both in zip(*group, strict=True)] for group in pairs])
