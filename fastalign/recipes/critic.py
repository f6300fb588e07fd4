"""The critic of actor-critic methods: a value of every state in which a token was chosen, learned from returns."""

from __future__ import annotations

import torch
from torch import Tensor

from ..losses.value import value_loss
from ..models.reward import scores_at
from ..training.scores import ScoreBatch
from ..training.step import Update, Updater
from .policy import PolicyChunk


class Critic:
    """A backbone of its own with one linear score, and its optimizer.

    Args:
        updater: of a reward model (`models.reward`), whose score is the value.
        clip: how far a value may move from the one at sampling time; None: anywhere.
    """

    def __init__(self, updater: Updater, *, clip: float | None) -> None:
        self.updater, self.clip = updater, clip

    @torch.no_grad()
    def values(self, chunk: PolicyChunk) -> Tensor:
        """[N] fp32 on the CPU: the value of the state before each scored token."""
        device = next(self.updater.model.parameters()).device
        packed = chunk.packed.to(device)
        return scores_at(self.updater.model, packed, packed.rows).float().cpu()

    def update(self, chunks: list[PolicyChunk]) -> tuple[Update, dict[str, float]]:
        """One optimizer step towards the chunks' returns, every token weighted alike; what it was like before the step.

        Returns:
            the update, and value_avg (the mean loss a token), mean and explained variance of the values.
        """
        total = max(sum(len(chunk.advantages) for chunk in chunks), 1)
        batches = [ScoreBatch(chunk.packed, chunk.packed.rows, self._objective(chunk, total)) for chunk in chunks]
        result = self.updater.update(batches)
        values = torch.cat([batch.scores for batch in batches]).cpu() if batches else torch.zeros(0)
        returns = torch.cat([chunk.returns for chunk in chunks if chunk.returns is not None]) if batches else torch.zeros(0)
        spread = float(returns.var(correction=0)) if len(returns) else 0.0
        explained = 1 - float((returns - values).var(correction=0)) / spread if spread > 0 else float("nan")
        mean = float(values.mean()) if len(values) else float("nan")
        return result, {"loss/value_avg": result.loss, "val/mean": mean, "val/explained_variance": explained}

    def _objective(self, chunk: PolicyChunk, total: int):
        assert chunk.returns is not None

        def objective(values: Tensor) -> Tensor:
            old = None if chunk.values is None else chunk.values.to(values)
            return value_loss(values, chunk.returns.to(values), old, clip=self.clip).sum() / total  # type: ignore[union-attr]

        return objective
