"""The supervised task: packed conversations, only scored tokens reach the head."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from ..data import DataOrder, MixtureOrder, SegmentStream
from ..generation import Engine, SamplingParams
from ..losses.sft import nll
from ..packing import Packed, Segment, pack, split_by_tokens
from ..training.step import MicroBatch, Update, Updater, forward_backward


def supervised(packed: Packed, total_weight: float) -> MicroBatch:
    """The weighted mean negative log-likelihood; `total_weight` is that of the whole batch, so micro-batches add up."""
    weights = packed.weights

    def objective(logp: Tensor, entropy: Tensor, span: slice) -> Tensor:
        loss = nll(logp)
        return (loss if weights is None else loss * weights[span]).sum() / total_weight

    return MicroBatch(packed, objective)


def micro_batches(segments: list[Segment], max_tokens: int) -> list[MicroBatch]:
    """Cuts one optimizer step's conversations into packed micro-batches."""
    packs = [pack([segments[i] for i in members]) for members in split_by_tokens(segments, max_tokens)]
    total = sum(float(p.num_targets if p.weights is None else p.weights.sum()) for p in packs)
    return [supervised(p, max(total, 1e-9)) for p in packs if p.num_targets]


class SupervisedTask:
    """Supervised fine-tuning of one model on tokenized segments, chosen by an order or given by a stream (which has no `segments`)."""

    def __init__(
        self,
        *,
        updater: Updater,
        segments: list[Segment],
        eval_segments: list[Segment],
        order: DataOrder | MixtureOrder | SegmentStream,
        batch_size: int,
        max_tokens_per_micro_batch: int,
        engine: Engine | None = None,
        show_prompts: list[tuple[str, list[int]]] | None = None,
        show_params: SamplingParams | None = None,
    ):
        self.updater, self.order = updater, order
        self.segments, self.eval_segments = segments, eval_segments
        self.batch_size, self.max_tokens = batch_size, max_tokens_per_micro_batch
        self.engine, self.show_prompts, self.show_params = engine, show_prompts or [], show_params

    def step(self, index: int) -> dict[str, float]:
        began = time.perf_counter()
        chosen = self.draw()
        lr = self.updater.schedule.get_last_lr()[0]
        result: Update = self.updater.update(micro_batches(chosen, self.max_tokens), commit=self.commit)
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

    def draw(self) -> list[Segment]:
        """The segments of the next optimizer step."""
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
        """Held-out loss (weighted mean nats a token) and token accuracy."""
        if not self.eval_segments:
            return {}
        loss, correct, count = 0.0, 0.0, 0
        with torch.no_grad():
            for batch in micro_batches(self.eval_segments, self.max_tokens):
                share, metrics = forward_backward(self.updater.model, batch, self.updater.options, backward=False)
                loss += share
                correct += float(metrics["correct"].sum())
                count += metrics["logp"].numel()
        return {"eval/loss": loss, "eval/mean_token_accuracy": correct / max(count, 1)}

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
