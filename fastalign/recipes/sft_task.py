"""The supervised task: packed conversations, only scored tokens reach the head."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..data import DataOrder, MixtureOrder, SegmentStream
from ..data.ranked import Ranked
from ..generation import Engine, SamplingParams
from ..losses.sft import SUPERVISED, SupervisedLoss
from ..packing import Packed, Segment, pack, split_by_tokens
from ..training.step import MicroBatch, Update, Updater

Cut = Callable[[Sequence[Any], int], list[MicroBatch]]  # an optimizer step's examples, tokens at once → micro-batches


def micro_batches(segments: Sequence[Segment], max_tokens: int, row: SupervisedLoss = SUPERVISED["nll"]) -> list[MicroBatch]:
    """Cuts one optimizer step's conversations into packed micro-batches of a loss of tokens.

    The loss is the weighted mean over the scored tokens; the total weight is that of the whole step, so micro-batches add up.
    """
    packs = [pack([segments[i] for i in members]) for members in split_by_tokens(segments, max_tokens)]
    total = max(sum(float(p.num_targets if p.weights is None else p.weights.sum()) for p in packs), 1e-9)

    def of_tokens(packed: Packed) -> MicroBatch:
        def objective(logp: Tensor, entropy: Tensor, span: slice) -> Tensor:
            loss = row.function(logp)
            return (loss if packed.weights is None else loss * packed.weights[span].to(logp.device)).sum() / total

        return MicroBatch(packed, objective)

    return [of_tokens(packed) for packed in packs if packed.num_targets]


def ranked_micro_batches(groups: Sequence[Ranked], max_tokens: int, row: SupervisedLoss) -> list[MicroBatch]:
    """The same of a loss of groups: the mean over the groups, each with its prompt forwarded once."""

    def of_groups(members: list[int]) -> MicroBatch:
        packed = pack([groups[i].segment for i in members])
        scores = torch.tensor([score for i in members for score in groups[i].scores], dtype=torch.float64)
        units = packed.cu_targets[packed.cu_groups.long()]

        def objective(logp: Tensor, entropy: Tensor, span: slice) -> Tensor:
            first, last = torch.searchsorted(units, torch.tensor([span.start, span.stop], dtype=units.dtype)).tolist()
            cu_groups = packed.cu_groups[first : last + 1]
            start, stop = int(cu_groups[0]), int(cu_groups[-1])
            cu_targets = packed.cu_targets[start : stop + 1]
            losses = row.function(logp, cu_targets - cu_targets[0], cu_groups - start, scores[start:stop])
            return losses.sum() / len(groups)

        return MicroBatch(packed, objective, units)

    return [of_groups(members) for members in split_by_tokens([group.segment for group in groups], max_tokens)]


def cut_of(row: SupervisedLoss) -> Cut:
    """How the row's examples become micro-batches."""
    return partial(ranked_micro_batches if row.ranks else micro_batches, row=row)


class SupervisedTask:
    """Supervised fine-tuning of one model on tokenized examples: segments, or ranked groups.

    Args:
        segments: what `order` chooses from; empty where it is a stream.
        cut: how the loss makes micro-batches of examples: `cut_of` a row.
    """

    def __init__(
        self,
        *,
        updater: Updater,
        segments: Sequence[Any],
        eval_segments: Sequence[Any],
        order: DataOrder | MixtureOrder | SegmentStream,
        batch_size: int,
        max_tokens_per_micro_batch: int,
        cut: Cut = micro_batches,
        engine: Engine | None = None,
        show_prompts: list[tuple[str, list[int]]] | None = None,
        show_params: SamplingParams | None = None,
    ):
        self.updater, self.order = updater, order
        self.segments, self.eval_segments = segments, eval_segments
        self.batch_size, self.max_tokens, self.cut = batch_size, max_tokens_per_micro_batch, cut
        self.engine, self.show_prompts, self.show_params = engine, show_prompts or [], show_params

    def step(self, index: int) -> dict[str, float]:
        began = time.perf_counter()
        chosen = self.draw()
        lr = self.updater.schedule.get_last_lr()[0]
        result: Update = self.updater.update(self.cut(chosen, self.max_tokens), commit=self.commit)
        count = max(result.sums.get("targets", 0.0), 1.0)
        return {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": lr,
            "epoch": self.order.progress,
            "num_tokens": float(sum(s.num_tokens for s in chosen)),
            "entropy": result.sums.get("entropy", 0.0) / count,
            "mean_token_accuracy": result.sums.get("correct", 0.0) / count,
            "skipped_updates": float(not result.applied),
            "timing_s/update": time.perf_counter() - began,
        }

    def draw(self) -> list[Any]:
        """The examples of the next optimizer step."""
        if isinstance(self.order, SegmentStream):
            return self.order.next_batch(self.batch_size)
        return [self.segments[i] for i in self.order.next_batch(self.batch_size)]

    def commit(self, apply) -> None:
        if self.engine is None:
            apply()
        else:
            with self.engine.updating_weights():
                apply()

    def evaluate(self) -> dict[str, float]:
        """Held-out loss, mean negative log-likelihood (nats a scored token, whatever the loss) and token accuracy."""
        if not self.eval_segments:
            return {}
        loss, nats, correct, count = 0.0, 0.0, 0.0, 0
        with torch.no_grad():
            for batch in self.cut(self.eval_segments, self.max_tokens):
                share, metrics = batch.forward_backward(self.updater.model, self.updater.options, backward=False)
                loss += share
                nats -= float(metrics["logp"].double().sum())
                correct += float(metrics["correct"].sum())
                count += metrics["logp"].numel()
        count = max(count, 1)
        return {"eval/loss": loss, "eval/nll_loss": nats / count, "eval/mean_token_accuracy": correct / count}

    def show(self) -> list[dict[str, Any]]:
        """Greedy completions of a few prompts."""
        if self.engine is None or not self.show_prompts:
            return []
        outputs = self.engine.generate([ids for _, ids in self.show_prompts], self.show_params)
        self.engine.release_cache()  # the update has the memory
        texts = [out.outputs[0].text for out in outputs]
        return [{"prompt": prompt, "completion": text} for (prompt, _), text in zip(self.show_prompts, texts, strict=True)]

    def state_dict(self) -> dict:
        return {"order": self.order.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.order.load_state_dict(state["order"])
