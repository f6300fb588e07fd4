"""The supervised task: packed conversations, only scored tokens reach the head."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..data import SegmentStream
from ..data.ranked import Ranked
from ..losses.sft import SUPERVISED, SupervisedLoss
from ..packing import Packed, Segment, pack, split_by_tokens
from ..staging import Traveller
from ..training.step import MicroBatch, Update
from .offline_task import OfflineTask

Cut = Callable[[Sequence[Any], int], list[MicroBatch]]  # an optimizer step's examples, tokens at once → micro-batches


def micro_batches(segments: Sequence[Segment], max_tokens: int, row: SupervisedLoss = SUPERVISED["nll"]) -> list[MicroBatch]:
    """Cuts one optimizer step's conversations into packed micro-batches of a loss of tokens.

    The loss is the weighted mean over the scored tokens; the total weight is that of the whole step, so micro-batches add up.
    """
    packs = [pack([segments[i] for i in members]) for members in split_by_tokens(segments, max_tokens)]
    total = max(sum(float(p.num_targets if p.weights is None else p.weights.sum()) for p in packs), 1e-9)

    def of_tokens(packed: Packed) -> MicroBatch:
        column = Traveller(packed.weights)

        def objective(logp: Tensor, entropy: Tensor, span: slice) -> Tensor:
            loss, (weights,) = row.function(logp), column.at(logp.device)
            return (loss if weights is None else loss * weights[span]).sum() / total

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


class SupervisedTask(OfflineTask):
    """Supervised fine-tuning of one model on tokenized examples: segments, or ranked groups.

    Args:
        segments: what `order` chooses from; empty where it is a stream.
        cut: how the loss makes micro-batches of examples: `cut_of` a row.
        shared: as `OfflineTask`.
    """

    def __init__(self, *, segments: Sequence[Any], eval_segments: Sequence[Any], cut: Cut = micro_batches, **shared: Any):
        super().__init__(**shared)
        self.segments, self.eval_segments, self.cut = segments, eval_segments, cut

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

    def evaluate(self) -> dict[str, float]:
        """Held-out loss, mean negative log-likelihood (nats a scored token, whatever the loss) and token accuracy."""
        if not self.eval_segments:
            return {}
        loss, nats, correct, count = 0.0, 0.0, 0.0, 0
        with torch.no_grad():
            for batch in self.cut(self.eval_segments, self.max_tokens):
                share, metrics = batch.forward_backward(self.updater.model, self.updater.options, backward=False)
                loss += float(share)
                nats -= float(metrics["logp"].double().sum())
                correct += float(metrics["correct"].sum())
                count += metrics["logp"].numel()
        count = max(count, 1)
        return {"eval/loss": loss, "eval/nll_loss": nats / count, "eval/mean_token_accuracy": correct / count}
