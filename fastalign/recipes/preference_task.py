"""The preference task: packed pairs, their prompt forwarded once, the gradient taken inside the forward."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..models.backbone import head_of
from ..packing import Segment, pack, split_by_tokens
from ..training.step import Update
from .offline_task import OfflineTask
from .pair_objective import PairBatch, PairObjective

_FIXED = ("entropy", "correct", "targets", "flops_tvh", "num_chunks")


@dataclass(frozen=True)
class PairData:
    """Pairs ready to train on.

    Attributes:
        trees: as `data.Pairs` has them.
        margins, probabilities: one a pair, or None.
        ref_logps: by pair, the reference's log-probs [N] of its scored tokens; empty: no row reads a reference.
    """

    trees: list[Segment] = field(default_factory=list)
    margins: list[float] | None = None
    probabilities: list[float] | None = None
    ref_logps: dict[int, Tensor] = field(default_factory=dict)

    def cut(self, chosen: Sequence[int], max_tokens: int, device: torch.device) -> list[PairBatch]:
        """The chosen pairs as micro-batches of at most `max_tokens` forwarded tokens."""
        trees = [self.trees[i] for i in chosen]
        return [self._batch(chosen, members, trees, device) for members in split_by_tokens(trees, max_tokens)]

    def _batch(self, chosen: Sequence[int], members: list[int], trees: list[Segment], device: torch.device) -> PairBatch:
        own = [chosen[i] for i in members]
        ref = torch.cat([self.ref_logps[i] for i in own]).to(device) if self.ref_logps else None
        read = [
            None if values is None else torch.tensor([values[i] for i in own], dtype=torch.float64, device=device)
            for values in (self.margins, self.probabilities)
        ]
        return PairBatch(pack([trees[i] for i in members]).to(device), torch.tensor(members), ref, *read)


class PreferenceTask(OfflineTask):
    """Preference optimization of one model on pairs; `shared` as `OfflineTask`."""

    def __init__(self, *, objective: PairObjective, data: PairData, eval_data: PairData, **shared: Any):
        super().__init__(**shared)
        self.objective, self.data, self.eval_data = objective, data, eval_data
        self.carried: dict[str, float] = {}  # by row, the running number of its batches (BCO's shift)
        self.device = head_of(self.updater.model).weight.device

    def step(self, index: int) -> dict[str, float]:
        began = time.perf_counter()
        chosen = self.order.next_batch(self.batch_size)
        lr = self.updater.schedule.get_last_lr()[0]
        batches = self.data.cut(chosen, self.max_tokens, self.device)
        statistics = self.objective.statistics(self.updater.model, batches, self.carried)
        self.carried |= {row: value for row, found in statistics.items() for value in found.values() if isinstance(value, float)}
        result: Update = self.updater.update(
            [self.objective.micro_batch(batch, len(chosen), statistics) for batch in batches], commit=self.commit
        )
        return {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": lr,
            "epoch": self.order.progress,
            "num_tokens": float(sum(batch.packed.num_tokens for batch in batches)),
            "entropy": result.sums.get("entropy", 0.0) / max(result.sums.get("targets", 0.0), 1.0),
            **{name: value / len(chosen) for name, value in result.sums.items() if name not in _FIXED},
            "skipped_updates": float(not result.applied),
            "timing_s/update": time.perf_counter() - began,
        }

    def evaluate(self) -> dict[str, float]:
        """Held-out loss and reward metrics, means over pairs. Numbers of a whole batch are those of batches of the training size."""
        count, sums = len(self.eval_data.trees), dict[str, float]()
        with torch.no_grad():
            for start in range(0, count, self.batch_size):
                chosen = list(range(start, min(start + self.batch_size, count)))
                batches = self.eval_data.cut(chosen, self.max_tokens, self.device)
                statistics = self.objective.statistics(self.updater.model, batches, self.carried)
                for batch in batches:
                    micro_batch = self.objective.micro_batch(batch, count, statistics)
                    share, metrics = micro_batch.forward_backward(self.updater.model, self.updater.options, backward=False)
                    sums["loss"] = sums.get("loss", 0.0) + float(share)
                    for name in metrics.keys() - {*_FIXED, "logp"}:
                        sums[name] = sums.get(name, 0.0) + float(metrics[name]) / count
        return {f"eval/{name}": sums[name] for name in sorted(sums)}

    def state_dict(self) -> dict:
        return {"order": self.order.state_dict(), "carried": dict(self.carried)}

    def load_state_dict(self, state: dict) -> None:
        self.order.load_state_dict(state["order"])
        self.carried = dict(state["carried"])
