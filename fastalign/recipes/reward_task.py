"""The reward task: candidates packed as token trees, a loss of their scores."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..data import DataOrder, Judged, attribute_examples, outcome_examples, ranking_examples, step_examples
from ..losses.reward import RewardLoss, pairs_of
from ..models.reward import place_rows, score_trees
from ..packing import pack, split_by_tokens
from ..training.scores import ScoreBatch
from ..training.step import Update, Updater

NUM_SHOWN = 3


def offsets_of(examples: Sequence[Judged]) -> Tensor:
    """[P+1] int64: ranking p's scores are cu[p]:cu[p+1]."""
    return torch.tensor([0, *(len(example.places) for example in examples)]).cumsum(0)


def labels_of(examples: Sequence[Judged]) -> Tensor:
    """[N] labels of all places."""
    return torch.tensor([label for example in examples for label in example.labels])


def grades_of(examples: Sequence[Judged]) -> Tensor:
    """[N, K] grades, NaN where a record states none."""
    return torch.tensor([example.labels for example in examples])


def pair_metrics(examples: Sequence[Judged], scores: Tensor) -> dict[str, float]:
    """Share of pairs whose better answer has the higher score (a tie is none), and the mean difference."""
    better, worse, _ = pairs_of(offsets_of(examples))
    gaps = scores[better] - scores[worse]
    return {"accuracy": float((gaps > 0).float().mean()), "margin": float(gaps.mean())} if gaps.numel() else {}


def label_metrics(examples: Sequence[Judged], scores: Tensor) -> dict[str, float]:
    """Share of labels on the right side of 0, and the mean score of the right less that of the wrong (left out where one is missing)."""
    right = labels_of(examples) > 0.5
    found = {"accuracy": float(((scores > 0) == right).float().mean())}
    if right.any() and not right.all():
        found["margin"] = float(scores[right].mean() - scores[~right].mean())
    return found


def grade_metrics(examples: Sequence[Judged], scores: Tensor) -> dict[str, float]:
    """Mean squared error of the grades that are stated, and the mean of the attributes' correlations (left out where nothing varies)."""
    grades = grades_of(examples)
    found, correlations = {"mse": float((scores - grades).square().nanmean())}, []
    for own, given in zip(scores.double().t(), grades.double().t(), strict=True):
        stated = ~given.isnan()
        pair = torch.stack([own[stated], given[stated]])
        if pair.shape[1] > 1 and bool((pair.std(1) > 0).all()):
            correlations.append(float(torch.corrcoef(pair)[0, 1]))
    return found | ({"correlation": sum(correlations) / len(correlations)} if correlations else {})


@dataclass(frozen=True)
class Reading:
    """How one kind of data is read: records → examples, what the loss gets beside the scores, its units, its metrics."""

    examples: Callable[..., list[Judged]]
    given: Callable[[Sequence[Judged]], Tensor]
    num_units: Callable[[Sequence[Judged]], int]
    metrics: Callable[[Sequence[Judged], Tensor], dict[str, float]]


def _num_places(examples: Sequence[Judged]) -> int:
    return sum(len(example.places) for example in examples)


READINGS = {
    "rankings": Reading(ranking_examples, offsets_of, len, pair_metrics),
    "outcomes": Reading(outcome_examples, labels_of, _num_places, label_metrics),
    "steps": Reading(step_examples, labels_of, _num_places, label_metrics),
    "attributes": Reading(attribute_examples, grades_of, len, grade_metrics),
}


@dataclass(frozen=True)
class RewardObjective:
    """A row of the table with its options, as a loss of examples.

    Attributes:
        row: the equation and the data it reads.
        options: the row's own keyword arguments.
        attributes: what is graded and what each grade counts in the reward; empty where there is one score.
    """

    row: RewardLoss
    options: Mapping[str, Any] = field(default_factory=dict)
    attributes: Mapping[str, float] = field(default_factory=dict)

    @property
    def reading(self) -> Reading:
        return READINGS[self.row.reads]

    def batches(self, examples: Sequence[Judged], max_tokens: int) -> list[tuple[list[Judged], ScoreBatch]]:
        """Packed micro-batches of one optimizer step, each with its examples. The loss is the mean over all units."""
        total = max(self.reading.num_units(examples), 1)
        found = []
        for members in split_by_tokens([example.tree for example in examples], max_tokens):
            own = [examples[i] for i in members]
            packed = pack([example.tree for example in own])
            rows = place_rows(packed, [example.places for example in own])
            found.append((own, ScoreBatch(packed, rows, self.share(own, total), graded=bool(self.attributes))))
        return found

    def share(self, examples: Sequence[Judged], total: int) -> Callable[[Tensor], Tensor]:
        """Scores of the examples' places → their share of the mean over `total` units."""
        given, options = self.reading.given(examples), dict(self.options)
        if "margin" in self.row.options and any(example.margin for example in examples):
            options["margin"] = torch.tensor([example.margin for example in examples])
        if "probability" in self.row.options and any(example.probability != 1 for example in examples):
            options["probability"] = torch.tensor([example.probability for example in examples])

        def objective(scores: Tensor) -> Tensor:
            return self.row.function(scores, given, **options).sum() / total

        return objective

    def metrics(self, examples: Sequence[Judged], scores: Tensor) -> dict[str, float]:
        """accuracy and margin (of grades their errors), and the least, mean and greatest reward."""
        found, rewards = self.reading.metrics(examples, scores), scores
        if self.attributes:
            errors = (scores - grades_of(examples)).square().nanmean(0)
            found |= {f"mse/{name}": float(error) for name, error in zip(self.attributes, errors, strict=True) if not error.isnan()}
            rewards = scores @ scores.new_tensor(list(self.attributes.values()))
        extremes = {"min_reward": float(rewards.min()), "mean_reward": float(rewards.mean()), "max_reward": float(rewards.max())}
        return found | extremes


class RewardTask:
    """Training of one reward model on examples that are judged."""

    def __init__(
        self,
        *,
        updater: Updater,
        objective: RewardObjective,
        examples: list[Judged],
        eval_examples: list[Judged],
        order: DataOrder,
        batch_size: int,
        max_tokens_per_micro_batch: int,
        tokenizer: Any,
    ):
        self.updater, self.objective, self.order, self.tokenizer = updater, objective, order, tokenizer
        self.examples, self.eval_examples = examples, eval_examples
        self.batch_size, self.max_tokens = batch_size, max_tokens_per_micro_batch

    def step(self, index: int) -> dict[str, float]:
        began = time.perf_counter()
        chosen = [self.examples[i] for i in self.order.next_batch(self.batch_size)]
        lr = self.updater.schedule.get_last_lr()[0]
        batches = self.objective.batches(chosen, self.max_tokens)
        result: Update = self.updater.update([batch for _, batch in batches])
        seen = [example for own, _ in batches for example in own]
        return {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": lr,
            "epoch": self.order.progress,
            "num_tokens": float(sum(example.tree.num_tokens for example in chosen)),
            **self.objective.metrics(seen, torch.cat([batch.scores for _, batch in batches]).cpu()),
            "skipped_updates": float(not result.applied),
            "timing_s/update": time.perf_counter() - began,
        }

    def evaluate(self) -> dict[str, float]:
        """Held-out loss and metrics; the accuracy (of grades the error) of each subset, too, where the records name theirs."""
        if not self.eval_examples:
            return {}
        with torch.no_grad():
            batches = self.objective.batches(self.eval_examples, self.max_tokens)
            loss = sum(float(batch.forward(self.updater.model)) for _, batch in batches)
        seen = [example for own, _ in batches for example in own]
        scores = torch.cat([batch.scores for _, batch in batches]).cpu()
        values = {"loss": loss, **self.objective.metrics(seen, scores)}
        for subset in sorted({example.subset for example in seen} - {""}):
            members = [(e, s) for e, s in zip(seen, scores.split([len(e.places) for e in seen]), strict=True) if e.subset == subset]
            found = self.objective.reading.metrics([e for e, _ in members], torch.cat([s for _, s in members]))
            values |= {f"{name}/{subset}": found[name] for name in ("accuracy", "mse") if name in found}
        return {f"eval/{name}": value for name, value in values.items()}

    def show(self) -> list[dict[str, Any]]:
        """The answers of a few examples and their rewards; of one by steps, the last step's."""
        examples = (self.eval_examples or self.examples)[:NUM_SHOWN]
        scores = score_trees(self.updater.model, [e.tree for e in examples], [e.places for e in examples], max_tokens=self.max_tokens)
        shown = []
        for example, rewards in zip(examples, scores, strict=True):
            root, answers = example.tree, example.tree.children
            prompt = self.tokenizer.decode(list(root.ids), skip_special_tokens=True)
            if not answers:
                shown.append({"prompt": prompt, "completion": "", "reward": float(rewards[-1])})
            for answer, reward in zip(answers, rewards, strict=False):
                text = self.tokenizer.decode(list(answer.ids), skip_special_tokens=True)
                shown.append({"prompt": prompt, "completion": text, "reward": float(reward)})
        return shown

    def state_dict(self) -> dict:
        return {"order": self.order.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.order.load_state_dict(state["order"])
