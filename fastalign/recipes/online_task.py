"""The online task: prompts → engine → rewards → advantages → packed update. Every algorithm is a row."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..advantages import READS
from ..algorithms import Algorithm
from ..data import DataOrder, Prompt
from ..generation import Engine, SamplingParams
from ..rewards import RewardSet
from ..rollout import Rollout
from ..training.step import Update, Updater
from .ahead import Ahead, Collected
from .policy import PolicyChunk, build_chunks, group_advantages, micro_batch
from .reference import Reference
from .reuse import ForwardReuse, Reused
from .rollout_metrics import group_metrics, reward_metrics
from .samplers import Progress, Sampler, single_turn
from .scored_rollouts import ScoringGroups, evaluate, greedy_params, score, show

log = logging.getLogger("fastalign")
MAX_REFILLS = 10
MOST_SILENT = 10  # rollouts in a row without a single reward that a run goes on for


class OnlineTask:
    """One step: sample a batch of groups, score, update. The loop calls `step`, `evaluate` and the state methods."""

    def __init__(
        self,
        *,
        updater: Updater,
        engine: Engine,
        exact_engine: Engine,
        reference: Reference | None,
        rewards: RewardSet,
        prompts: list[Prompt],
        eval_prompts: list[Prompt],
        order: DataOrder,
        algorithm: Algorithm,
        params: SamplingParams,
        num_prompts: int,
        num_iterations: int,
        max_tokens_per_micro_batch: int,
        sampler: Sampler = single_turn,
        ahead: Ahead | None = None,
        plain_ratio: bool = False,
        reuse: ForwardReuse | None = None,
    ):
        self.updater, self.engine, self.reference, self.rewards = updater, engine, reference, rewards
        self.exact_engine = exact_engine  # of what is evaluated and shown; another one where rollouts are quantized, or of a copy
        self.ahead, self.plain_ratio, self.reuse = ahead, plain_ratio, reuse
        self.progress: Progress = _nobody_asks if ahead is None else ahead.still_wanted
        self.prompts, self.eval_prompts, self.order = prompts, eval_prompts, order
        self.algorithm, self.params = algorithm, params
        self.num_prompts, self.num_iterations = num_prompts, num_iterations
        self.max_tokens = max_tokens_per_micro_batch
        self.num_requests = 0  # counts groups over the whole run: the random key of each, so that a resumed run repeats
        self.epoch, self.staleness = 0.0, 0.0  # of the step's rollout
        self._timings = threading.local()  # a thread that collects ahead counts on its own
        self.sampler = sampler
        self.reward_weights = rewards.weights | sampler.weights
        self.updates_policy = True  # after the rollout that is sampled now
        self.silent = 0  # rollouts in a row without a reward
        self.companions: dict[str, tuple[Updater, Any]] = {}  # models that learn beside the policy, with their tokenizers

    def close(self) -> None:
        """Ends what is sampled ahead, and the rewards' processes."""
        if self.ahead is not None:
            self.ahead.close()
        self.rewards.close()

    @property
    def timing(self) -> dict[str, float]:
        """Seconds of this step by name, as this thread counts them."""
        if not hasattr(self._timings, "seconds"):
            self._timings.seconds = defaultdict(float)
        return self._timings.seconds

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.timing[name] += time.perf_counter() - start

    def step(self, index: int) -> dict[str, float]:
        self.timing.clear()
        rollout = self.next_rollout(index)
        chunks, told = self.judge(rollout)
        if self.reference is not None:
            with self.timed("reference"):
                for chunk in chunks:
                    if chunk.ref_logp is None:
                        chunk.ref_logp = self.reference.score(chunk.packed, temperature=self.params.temperature)
        with self.timed("update"):
            updates = [self.update(chunks, first=i == 0) for i in range(self.num_iterations)]
        return self.metrics(rollout, chunks, updates) | told

    def next_rollout(self, index: int) -> Rollout:
        """The rollout of step `index`: sampled now, or while the step before updated."""
        if self.ahead is None:
            rollout, self.epoch = self.collect(), self.order.progress
            self.engine.release_cache()  # the update has the memory
            return rollout
        with self.timed("rollout_wait"):
            batch = self.ahead.take(index, self._collected)
        self.timing.update(batch.timing)
        self.epoch, self.staleness = batch.epoch, self.ahead.lag(batch.rollout)
        return batch.rollout

    def _collected(self) -> Collected:
        """In the thread that is ahead."""
        self.timing.clear()
        return Collected(self.collect(), self.order.progress, dict(self.timing))

    def judge(self, rollout: Rollout) -> tuple[list[PolicyChunk], dict[str, float]]:
        """The rollout's micro-batches with their advantages, and metrics of the judgement."""
        return self.chunks_of(rollout, group_advantages(rollout, self.algorithm, self.reward_weights)), {}

    def chunks_of(self, rollout: Rollout, advantages: Tensor) -> list[PolicyChunk]:
        """Micro-batches of the samples whose advantage [B] can give a gradient."""
        return build_chunks(rollout, advantages, self.algorithm, budget=self.params.max_tokens, max_tokens=self.max_tokens)

    def update(self, chunks: list[PolicyChunk], *, first: bool) -> Update:
        """One optimizer step on the whole batch. The first forward gives the old log-probs of later iterations, unless those are to
        be the sampler's."""
        lr = self.updater.schedule.get_last_lr()[0]
        for chunk in chunks if self.plain_ratio else ():
            chunk.old_logp = chunk.sampler_logp
        known = self._known(chunks) if first else None
        replays = [None] * len(chunks) if known is None else known.replays
        batches = (micro_batch(c, self.algorithm, replay) for c, replay in zip(chunks, replays, strict=True))
        result = self.updater.update(batches, commit=self.commit)
        result.sums["learning_rate"] = lr
        if first:
            gaps = [] if known is None else [known.gap]
            for chunk, logp in zip(chunks, result.logps, strict=True):
                chunk.old_logp = chunk.sampler_logp if self.plain_ratio else logp
                if known is None:
                    gaps.append((logp - chunk.sampler_logp.to(logp.device)).abs())
            gap = torch.cat(gaps) if gaps else torch.zeros(0)
            result.sums |= {"gap_mean": float(gap.mean()), "gap_max": float(gap.max())} if gap.numel() else {}
            result.sums["reused"] = 0.0 if known is None else known.share
        return result

    def _known(self, chunks: list[PolicyChunk]) -> Reused | None:
        """What the rollout has computed of the first update's forward pass."""
        if self.reuse is None:
            return None
        return self.reuse.take(self.updater.model, chunks, temperature=self.params.temperature, key=self.num_requests)

    def commit(self, apply) -> None:
        with ExitStack() as stack:
            for engine in {self.exact_engine} if self.ahead is not None else {self.engine, self.exact_engine}:
                stack.enter_context(engine.updating_weights())
            apply()

    def collect(self) -> Rollout:
        """A rollout of `num_prompts` groups; under dynamic sampling only groups with mixed rewards (before shaping), refilled."""
        kept = Rollout([], [], [])
        if self.reuse is not None:
            self.reuse.forget()
        for _ in range(MAX_REFILLS if self.algorithm.dynamic_sampling else 1):
            rollout = self.sample([self.prompts[i] for i in self.order.next_batch(self.num_prompts - len(kept.prompts))])
            for p, (prompt, samples, columns) in enumerate(zip(rollout.prompts, rollout.samples, rollout.columns, strict=True)):
                totals = {s.unshaped_reward(self.reward_weights) for s in samples}
                if not self.algorithm.dynamic_sampling or len({t for t in totals if not math.isnan(t)}) > 1:
                    kept.prompts.append(prompt)
                    kept.samples.append(samples)
                    kept.columns.append(columns)
                    kept.greedy += rollout.greedy[p : p + 1]
                    kept.opponents += rollout.opponents[p : p + 1]
            if len(kept.prompts) == self.num_prompts:
                return kept
        log.warning("dynamic sampling: %d of %d groups had mixed rewards after %d rounds", len(kept.prompts), self.num_prompts, MAX_REFILLS)
        return kept if kept.prompts else rollout

    def sample(self, prompts: list[Prompt]) -> Rollout:
        """Groups of completions of these prompts, with their rewards; what of them may be scored early is scored meanwhile."""
        with ScoringGroups(self.rewards, prompts, self.params.n) as groups:
            with self.timed("rollout"):
                keys = list(range(self.num_requests, self.num_requests + len(prompts)))
                with self._recording(prompts):
                    rollout = self.sampler(self.engine, prompts, self.params, keys, self.progress, on_group=groups.on_group)
                self.num_requests += len(prompts)
                most_probable = None
                if READS.get(self.algorithm.advantage) == "greedy":
                    most_probable = self.sampler(self.engine, prompts, greedy_params(self.params), progress=self.progress)
            with self.timed("reward"):
                score(self.rewards, prompts, rollout, groups, beside=self.sampler.weights)
                if most_probable is not None:
                    score(self.rewards, prompts, most_probable, beside=self.sampler.weights)
                    rollout.greedy = most_probable.flat
        self.timing["reward_overlapped"] += groups.seconds
        self._listen(rollout)
        return rollout

    def _listen(self, rollout: Rollout) -> None:
        """Ends a run that nobody rewards: it would sample to the end and learn nothing."""
        heard = any(not math.isnan(sample.reward(self.reward_weights)) for sample in rollout.flat)
        self.silent = 0 if heard or not rollout.flat else self.silent + 1
        if self.silent >= MOST_SILENT:
            raise RuntimeError(
                f"no completion had a reward in {self.silent} rollouts in a row ({', '.join(self.reward_weights)}); the warnings above say"
                " why; the last checkpoint is where it was"
            )

    def _recording(self, prompts: list[Prompt]) -> AbstractContextManager[None]:
        """Around the sampling of these prompts."""
        if self.reuse is None or not self.updates_policy:
            return nullcontext()
        tokens = sum(self.params.n * (len(prompt.ids) + self.params.max_tokens) for prompt in prompts)
        return self.reuse.recording(2 * tokens if self.algorithm.dynamic_sampling else tokens)  # it may sample again

    def evaluate(self) -> dict[str, float]:
        """Greedy completions of the held-out prompts, their mean rewards."""
        self.settle()
        return evaluate(self.exact_engine, self.rewards, self.eval_prompts, self.params, self.sampler)

    def show(self) -> list[dict]:
        """Greedy completions of a few prompts."""
        self.settle()
        return show(self.exact_engine, self.rewards, self.eval_prompts or self.prompts, self.params, self.sampler)

    def settle(self) -> None:
        """Waits for what is sampled ahead: rewards and tokenizer serve one thread at a time."""
        if self.ahead is not None:
            self.ahead.settle()

    def sampled_metrics(self, rollout: Rollout) -> dict[str, float]:
        """What the step's rollout was like."""
        generated = sum(len(s.ids) for s in rollout.flat)
        out = {"epoch": self.epoch, "num_tokens": float(generated + sum(len(p) for p in rollout.prompts))}
        if self.ahead is not None:
            out["sampling/staleness"] = self.staleness
        return out | reward_metrics(rollout.flat, self.reward_weights) | group_metrics(rollout, self.reward_weights)

    def metrics(self, rollout: Rollout, chunks: list[PolicyChunk], updates: list[Update]) -> dict[str, float]:
        first = updates[0].sums
        count = first.get("targets") or math.nan  # nothing was forwarded: no token to average over, and the row leaves these out
        last, steps = updates[-1].sums, len(updates)
        targets = max(sum(u.sums.get("targets", 0.0) for u in updates), 1.0)
        clips = {k: sum(u.sums.get(k, 0.0) for u in updates) / targets for k in ("clip_low", "clip_high")}
        out = {
            "loss": sum(u.loss for u in updates) / steps,
            "grad_norm": updates[-1].grad_norm,
            "learning_rate": last["learning_rate"],
            "entropy": first.get("entropy", 0.0) / count,
            "clip_ratio/low_mean": clips["clip_low"],
            "clip_ratio/high_mean": clips["clip_high"],
            "clip_ratio/region_mean": clips["clip_low"] + clips["clip_high"],
            "sampling/sampling_logp_difference/mean": first.get("gap_mean", math.nan),
            "sampling/sampling_logp_difference/max": first.get("gap_max", math.nan),
            "forward_reused": first.get("reused", math.nan),
            "skipped_updates": float(sum(not u.applied for u in updates)),
        }
        if self.reference is not None:
            out["kl"] = first.get("kl", 0.0) / count
        if "correction" in first:
            out["sampling/importance_sampling_ratio/mean"] = first["correction"] / count
            out["sampling/importance_sampling_ratio/clipped"] = first["correction_clipped"] / count
        return out | self.sampled_metrics(rollout) | {f"timing_s/{name}": value for name, value in self.timing.items()}

    def state_dict(self) -> dict:
        ahead = {} if self.ahead is None else {"ahead": self.ahead.state_dict()}  # first: it waits, and the order stands still
        reuse = {} if self.reuse is None else {"reuses_forward": self.reuse.works}
        return {"order": self.order.state_dict(), "num_requests": self.num_requests, **reuse, **ahead}

    def load_state_dict(self, state: dict) -> None:
        if self.ahead is None and "ahead" in state:
            raise ValueError("the checkpoint holds a rollout that was sampled one step ahead; resume with --max_staleness 1")
        self.order.load_state_dict(state["order"])
        self.num_requests = state["num_requests"]
        if self.reuse is not None:
            self.reuse.works &= state.get("reuses_forward", True)
        if self.ahead is not None and "ahead" in state:
            self.ahead.load_state_dict(state["ahead"])


def _nobody_asks(count: int) -> None:
    """Samples have ended, and the rollout goes on."""
