"""The distillation task: packed sequences through student and teacher, both heads over the same rows, logits a chunk at a time."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..data import DataOrder
from ..generation import Engine, SamplingParams
from ..models.backbone import Head, head_of
from ..ops.linear_kl import linear_kl
from ..ops.linear_logp import linear_logp
from ..packing import Packed, Segment, group, pack, split_by_tokens
from ..training.step import LogitOptions, Updater, scored_hidden
from .samples import greedy_samples


@dataclass(frozen=True)
class Divergence:
    """What is minimized: a row of the table, the generalized JSD's beta, and the temperature of both distributions."""

    name: str = "jsd"
    jsd_beta: float = 0.5
    temperature: float = 1.0


@dataclass(frozen=True)
class DistillBatch:
    """A micro-batch with its own pass: Σ row_weight · divergence(teacher, student) over the packed targets' rows.

    GKD (arXiv:2306.13649): the mean over scored tokens of D(p_teacher ‖ p_student)(next token | all before it), exact over the
    vocabulary. `row_weight` [N] fp32 is a token's weight over the total weight of the optimizer step, so micro-batches add up; on
    sampled completions these are the sampled tokens (TRL divides by the number of the given ones). There is no temperature² factor
    (Hinton's), as in TRL: scale the learning rate instead. TRL's loss is always at temperature 1; here it is the divergence's own.
    """

    packed: Packed
    row_weight: Tensor
    teacher: nn.Module
    divergence: Divergence

    def forward_backward(self, model: nn.Module, options: LogitOptions, *, backward: bool = True) -> tuple[Tensor, dict]:
        """Adds the student's gradients; returns the share of the loss, and the number of scored tokens."""
        head, other = head_of(model), head_of(self.teacher)
        packed = self.packed.to(head.weight.device)
        hidden = scored_hidden(model, packed)
        with torch.no_grad():
            theirs = scored_hidden(self.teacher, packed)
        loss = linear_kl(
            *scaled(hidden, head),
            *scaled(theirs, other),
            divergence=self.divergence.name,
            jsd_beta=self.divergence.jsd_beta,
            temperature=self.divergence.temperature,
            row_weight=self.row_weight.to(head.weight.device),
            bias=scaled_bias(head),
            teacher_bias=scaled_bias(other),
        )
        metrics: dict[str, Any] = {"targets": packed.num_targets}
        if backward:
            loss.backward()
        else:
            metrics |= measured(hidden, head, packed)
        return loss.detach(), metrics


def scaled(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Hidden rows and head weight whose product has the family's logit scale in it."""
    return hidden if head.logit_scale == 1.0 else hidden * head.logit_scale, head.weight


def scaled_bias(head: Head) -> Tensor | None:
    return head.bias if head.bias is None or head.logit_scale == 1.0 else head.bias * head.logit_scale


@torch.no_grad()
def measured(hidden: Tensor, head: Head, packed: Packed) -> dict[str, Any]:
    """The student's log-probs of the targets [N] and its entropies [N], at temperature 1."""
    logp, entropy = linear_logp(hidden, head.weight, packed.targets, bias=head.bias, temperature=head.temperature(), return_entropy=True)
    return {"logp": logp, "entropy": entropy}


def micro_batches(segments: Sequence[Segment], max_tokens: int, teacher: nn.Module, divergence: Divergence) -> list[DistillBatch]:
    """Cuts one optimizer step's sequences into packed micro-batches; the loss is the weighted mean over all scored tokens."""
    packs = [pack([segments[i] for i in members]) for members in split_by_tokens(segments, max_tokens)]
    packs = [packed for packed in packs if packed.num_targets]
    weights = [torch.ones(p.num_targets) if p.weights is None else p.weights for p in packs]
    total = max(sum(float(w.double().sum()) for w in weights), 1e-9)
    return [DistillBatch(p, w / total, teacher, divergence) for p, w in zip(packs, weights, strict=True)]


@dataclass(frozen=True)
class OnPolicy:
    """The share of steps whose completions the student samples; a whole optimizer step is on-policy or not (TRL: a forward pass).

    Attributes:
        lmbda: the share, GKD's λ.
        params: how it samples; `max_tokens` is cut where a prompt leaves less room.
        max_length: longest prompt and completion together.
        seed: chooses the steps, and with the step the samples.
    """

    lmbda: float
    params: SamplingParams
    max_length: int
    seed: int

    def chosen(self, index: int) -> bool:
        """Whether step `index` is on-policy; the same in every run with this seed."""
        return random.Random(f"fastalign on-policy step {self.seed} {index}").random() < self.lmbda

    def sample(self, engine: Engine, prompts: Sequence[Sequence[int]], index: int) -> list[Segment]:
        """One completion of each prompt by the student as it is, all of it scored."""
        limit = self.params.max_tokens
        params = [replace(self.params, max_tokens=min(limit, self.max_length - len(prompt))) for prompt in prompts]
        keys = [index * len(prompts) + i for i in range(len(prompts))]
        rollout = engine.rollout(prompts, params, request_ids=keys)
        engine.release_cache()  # the update has the memory
        return [group(prompt, [sample.ids for sample in samples]) for prompt, samples in zip(prompts, rollout.samples, strict=True)]


class DistillTask:
    """One step: a batch of given completions, or of the student's own, through both models; the divergence's gradient."""

    def __init__(
        self,
        *,
        updater: Updater,
        teacher: nn.Module,
        divergence: Divergence,
        on_policy: OnPolicy,
        engine: Engine,
        prompts: Sequence[list[int]],
        segments: Sequence[Segment],
        eval_segments: Sequence[Segment],
        order: DataOrder,
        batch_size: int,
        max_tokens_per_micro_batch: int,
        show_prompts: Sequence[tuple[str, list[int]]],
    ):
        self.updater, self.teacher, self.divergence, self.on_policy, self.engine = updater, teacher, divergence, on_policy, engine
        self.prompts, self.segments, self.eval_segments, self.order = prompts, segments, eval_segments, order
        self.batch_size, self.max_tokens, self.show_prompts = batch_size, max_tokens_per_micro_batch, show_prompts

    def step(self, index: int) -> dict[str, float]:
        began = time.perf_counter()
        chosen, sampled = self.order.next_batch(self.batch_size), self.on_policy.chosen(index)
        if sampled:
            segments = self.on_policy.sample(self.engine, [self.prompts[i] for i in chosen], index)
        else:
            segments = [self.segments[i] for i in chosen]
        rolled_out = time.perf_counter()
        lr = self.updater.schedule.get_last_lr()[0]
        batches = micro_batches(segments, self.max_tokens, self.teacher, self.divergence)
        result = self.updater.update(batches, commit=self.commit)
        lengths = [len(child.ids) for segment in segments for child in segment.children]
        own = {"completions/mean_length": sum(lengths) / len(lengths), "timing_s/rollout": rolled_out - began} if sampled else {}
        return {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": lr,
            "epoch": self.order.progress,
            "num_tokens": float(sum(s.num_tokens for s in segments)),
            "on_policy": float(sampled),
            f"loss/{'on_policy' if sampled else 'off_policy'}": result.loss,
            "skipped_updates": float(not result.applied),
            "timing_s/update": time.perf_counter() - rolled_out,
            **own,
        }

    def commit(self, apply) -> None:
        with self.engine.updating_weights():
            apply()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Held-out divergence, and the student's negative log-likelihood and entropy: nats a scored token."""
        if not self.eval_segments:
            return {}
        loss, nats, entropy, count = 0.0, 0.0, 0.0, 0
        for batch in micro_batches(self.eval_segments, self.max_tokens, self.teacher, self.divergence):
            share, metrics = batch.forward_backward(self.updater.model, self.updater.options, backward=False)
            loss += float(share)
            nats -= float(metrics["logp"].double().sum())
            entropy += float(metrics["entropy"].double().sum())
            count += batch.packed.num_targets
        return {"eval/loss": loss, "eval/nll_loss": nats / max(count, 1), "eval/entropy": entropy / max(count, 1)}

    def show(self) -> list[dict[str, Any]]:
        """Greedy completions of a few prompts."""
        params = SamplingParams(n=1, temperature=0.0, max_tokens=self.on_policy.params.max_tokens, stop=self.on_policy.params.stop)
        return greedy_samples(self.engine, self.show_prompts, params)

    def state_dict(self) -> dict:
        return {"order": self.order.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.order.load_state_dict(state["order"])
