"""Online preference optimization: sample a group, take its best and its worst completion as a pair, update on the pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..algorithms import OnlinePreference
from ..losses.checks import pair_plan
from ..packing import group, pack, split_by_tokens
from ..rollout import Rollout, Sample
from ..training.step import MicroBatch
from .online_task import OnlineTask, log
from .pair_objective import PairBatch, PairObjective, Term

_PACKED = ("entropy", "correct", "targets", "flops_tvh", "num_chunks")


def objective_of(row: OnlinePreference) -> PairObjective:
    """The row's preference loss.

    Raises:
        ValueError: options out of range, or a loss that compares completions of different pairs.
    """
    pair_plan(row.preference, row.preference_options, "reverse_kl", 0.5)
    return PairObjective((Term(row.preference, 1.0, row.preference_options),))


def best_and_worst(samples: list[Sample], weights: dict[str, float]) -> tuple[Sample, Sample] | None:
    """The first sample with the highest reward and the first with the lowest; None where no two rewards differ."""
    scored = [(sample.reward(weights), sample) for sample in samples]
    scored = [(reward, sample) for reward, sample in scored if not math.isnan(reward)]
    if not scored:
        return None
    best, worst = (choose(scored, key=lambda pair: pair[0]) for choose in (max, min))
    return (best[1], worst[1]) if best[0] > worst[0] else None


@dataclass(frozen=True)
class FoundPair:
    """Two completions of a prompt that are compared; of_reference: which of them the reference wrote, 0 or 1, where one did."""

    prompt: list[int]
    best: Sample
    worst: Sample
    of_reference: int = -1


class OnlinePreferenceTask(OnlineTask):
    """One step: sample groups, score, update on a pair a group. Groups whose rewards are all equal say nothing and are left out."""

    algorithm: OnlinePreference

    def __init__(self, **options: Any) -> None:
        super().__init__(**options | {"reuse": None})  # two completions of a group are forwarded, most of a rollout is not
        self.objective = objective_of(self.algorithm)

    def step(self, index: int) -> dict[str, float]:
        self.timing.clear()
        rollout = self.next_rollout(index)
        pairs = self.find_pairs(rollout)
        if not pairs:
            log.warning("step %d: no group has two different rewards, nothing is learned from it", index + 1)
        with self.timed("reference"):
            batches = self.batches(pairs)
        lr = self.updater.schedule.get_last_lr()[0]
        with self.timed("update"):
            for _ in range(self.num_iterations):
                result = self.updater.update([self.micro_batch(b, pairs) for b in batches], commit=self.commit)
        sums, count = result.sums, max(len(pairs), 1)
        out = {
            "loss": result.loss if pairs else math.nan,
            "grad_norm": result.grad_norm,
            "learning_rate": lr,
            "num_pairs": float(len(pairs)),
            "entropy": sums["entropy"] / sums["targets"] if sums.get("targets") else math.nan,
            **{name: value / count for name, value in sums.items() if name not in _PACKED},
            "skipped_updates": float(not result.applied),
        }
        return out | self.sampled_metrics(rollout) | {f"timing_s/{name}": value for name, value in self.timing.items()}

    def find_pairs(self, rollout: Rollout) -> list[FoundPair]:
        """What is compared: each group's best and worst completion."""
        found = [best_and_worst(samples, self.reward_weights) for samples in rollout.samples]
        return [FoundPair(prompt, *pair) for prompt, pair in zip(rollout.prompts, found, strict=True) if pair is not None]

    def micro_batch(self, batch: PairBatch, pairs: list[FoundPair]) -> MicroBatch:
        """The batch's share of the mean over all pairs."""
        return self.objective.micro_batch(batch, len(pairs), {})

    def batches(self, pairs: list[FoundPair]) -> list[PairBatch]:
        """The pairs, chosen first, as packed micro-batches with the reference's log-probs."""
        trees = []
        for pair in pairs:
            both = pair.best, pair.worst
            trees.append(group(pair.prompt, [s.ids for s in both], [s.scored or [True] * len(s.ids) for s in both]))
        found = []
        for members in split_by_tokens(trees, self.max_tokens) if trees else []:
            packed = pack([trees[i] for i in members])
            ref = None if self.reference is None else self.reference.score(packed, temperature=self.params.temperature)
            found.append(PairBatch(packed, torch.tensor(members), ref))
        return found
