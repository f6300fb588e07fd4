"""A micro-batch whose loss reads scores of a linear head instead of log-probs: reward models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..models.reward import grades_at, scores_at
from ..packing import Packed
from .step import LogitOptions


@dataclass
class ScoreBatch:
    """What one forward and backward pass reads.

    Attributes:
        packed: the token tree.
        rows: [N] int64, the hidden rows whose score is read.
        objective: scores [N] → its share of the final scalar, already divided by the units of the whole batch.
        graded: whether the objective reads the grades of attributes, [N, K], instead.
        scores: what the objective read, without gradient; there after a pass.
    """

    packed: Packed
    rows: Tensor
    objective: Callable[[Tensor], Tensor]
    graded: bool = False
    scores: Tensor = field(default_factory=lambda: torch.zeros(0))

    def forward_backward(self, model: nn.Module, options: LogitOptions, *, backward: bool = True) -> tuple[Tensor, dict]:
        """Adds the gradients of scores and backbone; returns the share of the loss."""
        loss = self.forward(model)
        if backward:
            loss.backward()
        return loss.detach(), {}

    def forward(self, model: nn.Module) -> Tensor:
        """The share of the loss, differentiable unless gradients are off."""
        device = next(model.parameters()).device
        scores = (grades_at if self.graded else scores_at)(model, self.packed.to(device), self.rows.to(device))
        self.scores = scores.detach()
        return self.objective(scores)
