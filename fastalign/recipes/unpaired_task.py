"""The unpaired preference task: completions that are desirable or not, each packed behind its prompt."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..data import Completions
from ..models.backbone import head_of
from ..packing import Segment, pack, split_by_tokens
from ..training.step import Update
from .label_objective import LabelBatch, LabelObjective
from .offline_task import OfflineTask


@dataclass(frozen=True)
class LabelledData:
    """Completions ready to train on.

    Attributes:
        completions: as `data.labelled_examples` gives them.
        ref_logps: by record, the reference's log-probs [N] of its completion.
        partners: by record, another one whose completion, behind this prompt, makes a mismatched pair; empty: none is needed.
        mismatched_ref_logps: by record, the reference's log-probs [N] of that pair.
    """

    completions: Completions = field(default_factory=lambda: Completions([], [], []))
    ref_logps: Mapping[int, Tensor] = field(default_factory=dict)
    partners: Mapping[int, int] = field(default_factory=dict)
    mismatched_ref_logps: Mapping[int, Tensor] = field(default_factory=dict)

    def cut(self, chosen: Sequence[int], max_tokens: int, device: torch.device) -> list[LabelBatch]:
        """The chosen records as micro-batches of at most `max_tokens` forwarded tokens."""
        trees = [self.completions.tree(i) for i in chosen]
        return _cut(chosen, trees, self.completions.labels, self.ref_logps, max_tokens, device)

    def mismatched(self, chosen: Sequence[int], max_tokens: int, device: torch.device) -> list[LabelBatch]:
        """The mismatched pairs of the chosen records."""
        paired = [i for i in chosen if i in self.partners]
        trees = [self.completions.behind(i, self.partners[i]) for i in paired]
        return _cut(paired, trees, self.completions.labels, self.mismatched_ref_logps, max_tokens, device)


def _cut(
    chosen: Sequence[int],
    trees: list[Segment],
    labels: Sequence[bool],
    ref_logps: Mapping[int, Tensor],
    max_tokens: int,
    device: torch.device,
) -> list[LabelBatch]:
    batches = []
    for members in split_by_tokens(trees, max_tokens) if trees else []:
        own = [chosen[i] for i in members]
        packed = pack([trees[i] for i in members]).to(device)
        ref = torch.cat([ref_logps[i] for i in own]).to(device)
        batches.append(LabelBatch(packed, torch.tensor(members), torch.tensor([labels[i] for i in own]), ref))
    return batches


class UnpairedTask(OfflineTask):
    """Preference optimization of one model on labelled completions; `shared` as `OfflineTask`."""

    def __init__(self, *, objective: LabelObjective, data: LabelledData, eval_data: LabelledData, **shared: Any):
        super().__init__(**shared)
        self.objective, self.data, self.eval_data = objective, data, eval_data
        self.carried: float | None = None  # the running number of the batches so far (BCO's shift)
        self.device = head_of(self.updater.model).weight.device

    def step(self, index: int) -> dict[str, float]:
        began = time.perf_counter()
        chosen = self.order.next_batch(self.batch_size)
        lr = self.updater.schedule.get_last_lr()[0]
        batches, statistics, looked_at = self.prepare(self.data, chosen)
        self.carried = next(iter(statistics.values()), None)
        result: Update = self.updater.update(
            [self.objective.micro_batch(batch, len(chosen), statistics) for batch in batches], commit=self.commit
        )
        return {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": lr,
            "epoch": self.order.progress,
            "num_tokens": float(sum(batch.packed.num_tokens for batch in batches) + looked_at),
            "entropy": result.sums.get("entropy", 0.0) / max(result.sums.get("targets", 0.0), 1.0),
            **self.objective.metrics(result.sums, statistics),
            "skipped_updates": float(not result.applied),
            "timing_s/update": time.perf_counter() - began,
        }

    def prepare(self, data: LabelledData, chosen: Sequence[int]) -> tuple[list[LabelBatch], dict[str, float], int]:
        """The chosen records as micro-batches, the numbers of their batch, and the tokens of the mismatched pairs."""
        batches = data.cut(chosen, self.max_tokens, self.device)
        mismatched = data.mismatched(chosen, self.max_tokens, self.device)
        statistics = self.objective.statistics(self.updater.model, batches, mismatched, self.carried)
        return batches, statistics, sum(batch.packed.num_tokens for batch in mismatched)

    def evaluate(self) -> dict[str, float]:
        """Held-out loss and reward metrics. Numbers of a whole batch are those of batches of the training size."""
        count, loss, sums, kl = len(self.eval_data.completions.labels), 0.0, dict[str, float](), list[dict[str, float]]()
        if not count:
            return {}
        with torch.no_grad():
            for start in range(0, count, self.batch_size):
                chosen = list(range(start, min(start + self.batch_size, count)))
                batches, statistics, _ = self.prepare(self.eval_data, chosen)
                kl.append({name: value * len(chosen) / count for name, value in statistics.items()})
                for batch in batches:
                    micro_batch = self.objective.micro_batch(batch, count, statistics)
                    share, metrics = micro_batch.forward_backward(self.updater.model, self.updater.options, backward=False)
                    loss += float(share)
                    for name, value in metrics.items():
                        if name in self.objective.SUMS:
                            sums[name] = sums.get(name, 0.0) + float(value)
        mean = {name: sum(values[name] for values in kl) for name in kl[0]}
        return {f"eval/{name}": value for name, value in {"loss": loss, **self.objective.metrics(sums, mean)}.items()}

    def state_dict(self) -> dict:
        return {"order": self.order.state_dict(), "carried": self.carried}

    def load_state_dict(self, state: dict) -> None:
        self.order.load_state_dict(state["order"])
        self.carried = state["carried"]
