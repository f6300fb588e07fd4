"""The rejection-sampling task: rounds of sampling, scoring and keeping the best, then supervised steps on what was kept."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..data import DataOrder, Prompt
from ..data.ranked import Ranked
from ..generation import Engine, SamplingParams
from ..losses.sft import SupervisedLoss
from ..packing import Segment, group
from ..rewards import RewardSet
from ..rollout import Rollout, Sample
from ..training.files import write_atomic
from ..training.step import Updater
from . import scored_rollouts
from .rollout_metrics import group_metrics, reward_metrics
from .samplers import Sampler, single_turn
from .sft_task import SupervisedTask, cut_of


@dataclass(frozen=True)
class Selection:
    """What of a prompt's completions is trained on (RFT, arXiv:2308.01825; RAFT, arXiv:2304.06767, Algorithm 1).

    Attributes:
        num_kept: the best so many.
        min_reward: completions below are never kept; None: no bound, so that a prompt whose rewards are all equal keeps its first.
    """

    num_kept: int = 1
    min_reward: float | None = None

    def best(self, samples: Sequence[Sample], weights: dict[str, float]) -> list[tuple[Sample, float]]:
        """(completion, reward), best first, earlier ones first among equals; repeated texts and missing rewards left out."""
        scored = [(sample, sample.reward(weights)) for sample in samples]
        bound = -math.inf if self.min_reward is None else self.min_reward
        good = sorted((pair for pair in scored if pair[1] >= bound), key=lambda pair: -pair[1])  # NaN is never >=
        unique: dict[str, tuple[Sample, float]] = {}
        for sample, reward in good:
            unique.setdefault(sample.text, (sample, reward))
        return list(unique.values())[: self.num_kept]


@dataclass(frozen=True)
class Kept:
    """What a prompt keeps in a round: token ids of the completions, which of them are scored (None: all), and their rewards.

    `index` is the prompt's in the data.
    """

    index: int
    completions: list[list[int]]
    rewards: list[float]
    scored: list[list[bool] | None] = field(default_factory=list)

    @property
    def masks(self) -> list[list[bool]]:
        """One flag a token of each completion."""
        given = self.scored or [None] * len(self.completions)
        return [mask or [True] * len(ids) for mask, ids in zip(given, self.completions, strict=True)]


class RejectionTask:
    """A round: sample, score, keep; then `steps_per_round` supervised steps on what was kept. The loop calls `step`.

    Args:
        prompts_per_round: how many prompts are sampled from in a round.
        row: the supervised loss; of one that ranks, the kept completions of a prompt are a group.
        kept_folder: gets kept-round-N.jsonl (prompt, completion, reward), N from 1.
    """

    def __init__(
        self,
        *,
        updater: Updater,
        engine: Engine,
        rewards: RewardSet,
        prompts: list[Prompt],
        eval_prompts: list[Prompt],
        params: SamplingParams,
        selection: Selection,
        row: SupervisedLoss,
        seed: int,
        shuffle: bool,
        prompts_per_round: int,
        steps_per_round: int,
        batch_size: int,
        max_tokens_per_micro_batch: int,
        kept_folder: Path,
        sampler: Sampler = single_turn,
    ):
        self.updater, self.engine, self.rewards, self.sampler = updater, engine, rewards, sampler
        self.prompts, self.eval_prompts, self.params = prompts, eval_prompts, params
        self.selection, self.row, self.seed, self.shuffle = selection, row, seed, shuffle
        self.order = DataOrder(len(prompts), seed=seed, shuffle=shuffle)
        self.prompts_per_round, self.steps_per_round = prompts_per_round, steps_per_round
        self.batch_size, self.max_tokens, self.kept_folder = batch_size, max_tokens_per_micro_batch, kept_folder
        self.round, self.num_requests = 0, 0  # rounds begun; groups sampled over the whole run: the random key of each
        self.kept: list[Kept] = []
        self.training: SupervisedTask | None = None

    def step(self, index: int) -> dict[str, float]:
        """One supervised step; the first of a round samples before it and tells the round's rewards."""
        found: dict[str, float] = {}
        if index // self.steps_per_round >= self.round:
            found = self.collect()
        assert self.training is not None
        metrics = self.training.step(index)
        generated = found.pop("num_tokens", 0.0)
        return metrics | found | {"num_tokens": metrics["num_tokens"] + generated, "round": float(self.round)}

    def collect(self) -> dict[str, float]:
        """Begins a round: samples, scores, keeps, writes what is kept, and returns the round's metrics.

        Raises:
            ValueError: nothing is kept.
        """
        began = time.perf_counter()
        chosen = self.order.next_batch(self.prompts_per_round)
        prompts = [self.prompts[i] for i in chosen]
        keys = list(range(self.num_requests, self.num_requests + len(prompts)))
        with scored_rollouts.ScoringGroups(self.rewards, prompts, self.params.n) as groups:
            rollout = self.sampler(self.engine, prompts, self.params, keys, on_group=groups.on_group)
            self.engine.release_cache()  # the update has the memory
            self.num_requests += len(prompts)
            sampled = time.perf_counter()
            scored_rollouts.score(self.rewards, prompts, rollout, groups, beside=self.sampler.weights)
        weights = self.rewards.weights | self.sampler.weights
        best = [self.selection.best(samples, weights) for samples in rollout.samples]
        self.round += 1
        self.write(prompts, best)
        self.kept = [
            Kept(i, [sample.ids for sample, _ in pairs], [reward for _, reward in pairs], [sample.scored for sample, _ in pairs])
            for i, pairs in zip(chosen, best, strict=True)
            if len(pairs) > self.row.ranks  # a ranking needs two
        ]
        metrics = self.metrics(rollout, weights)
        if not self.kept:
            raise ValueError(self.nothing(metrics))
        self.training = self.supervised()
        times = {"rollout": sampled - began, "reward": time.perf_counter() - sampled, "reward_overlapped": groups.seconds}
        return metrics | {f"timing_s/{name}": seconds for name, seconds in times.items()}

    def nothing(self, metrics: dict[str, float]) -> str:
        """Why a round keeps no completion, and what can be done."""
        wanted = "two different completions of a prompt" if self.row.ranks else "a completion"
        if self.selection.min_reward is not None:
            wanted += f" with a reward of at least {self.selection.min_reward:g}"
        return (
            f"round {self.round}: no prompt has {wanted} (mean reward {metrics['reward']:.4g}); lower --min_reward, raise"
            " --num_generations or --temperature, or start from a model that gets some prompts right"
        )

    def metrics(self, rollout: Rollout, weights: dict[str, float]) -> dict[str, float]:
        rewards = [reward for kept in self.kept for reward in kept.rewards]
        tokens = sum(len(sample.ids) for sample in rollout.flat) + sum(len(prompt) for prompt in rollout.prompts)
        return {
            "num_tokens": float(tokens),
            **reward_metrics(rollout.flat, weights),
            **group_metrics(rollout, weights),
            "kept/count": float(len(rewards)),
            "kept/reward": sum(rewards) / len(rewards) if rewards else math.nan,
            "kept/frac_prompts": len(self.kept) / len(rollout.prompts),
        }

    def write(self, prompts: list[Prompt], best: list[list[tuple[Sample, float]]]) -> None:
        """kept-round-N.jsonl: records that `fastalign sft` reads, each with its reward."""
        lines = []
        for prompt, pairs in zip(prompts, best, strict=True):
            for sample, reward in pairs:
                answer = sample.text if isinstance(prompt.prompt, str) else [{"role": "assistant", "content": sample.text}]
                lines.append(json.dumps({"prompt": prompt.prompt, "completion": answer, "reward": reward}, ensure_ascii=False) + "\n")
        self.kept_folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.kept_folder / f"kept-round-{self.round}.jsonl", "".join(lines))

    def supervised(self) -> SupervisedTask:
        """The round's supervised task."""
        examples: list[Segment | Ranked] = []
        for kept in self.kept:
            prompt = self.prompts[kept.index].ids
            if self.row.ranks:
                examples.append(Ranked(group(prompt, kept.completions, kept.masks), tuple(kept.rewards)))
            else:
                examples += [group(prompt, [ids], [mask]) for ids, mask in zip(kept.completions, kept.masks, strict=True)]
        return SupervisedTask(
            updater=self.updater,
            segments=examples,
            eval_segments=[],
            order=DataOrder(len(examples), seed=self.seed * 100_003 + self.round, shuffle=self.shuffle),
            batch_size=self.batch_size,
            max_tokens_per_micro_batch=self.max_tokens,
            cut=cut_of(self.row),
            engine=self.engine,
        )

    def evaluate(self) -> dict[str, float]:
        """Mean rewards of the held-out prompts' greedy completions."""
        return scored_rollouts.evaluate(self.engine, self.rewards, self.eval_prompts, self.params, self.sampler)

    def show(self) -> list[dict[str, Any]]:
        """Greedy completions of a few prompts."""
        return scored_rollouts.show(self.engine, self.rewards, self.eval_prompts or self.prompts, self.params, self.sampler)

    def state_dict(self) -> dict:
        return {
            "order": self.order.state_dict(),
            "num_requests": self.num_requests,
            "round": self.round,
            "kept": [asdict(kept) for kept in self.kept],
            "training": self.training.state_dict() if self.training else None,
        }

    def load_state_dict(self, state: dict) -> None:
        self.order.load_state_dict(state["order"])
        self.num_requests, self.round = state["num_requests"], state["round"]
        self.kept = [Kept(**kept) for kept in state["kept"]]
        if state["training"] is not None:
            self.training = self.supervised()
            self.training.load_state_dict(state["training"])
