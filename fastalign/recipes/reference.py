"""The reference policy: a frozen copy of the model, or the model with its adapter off."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..models.adapters import is_adapted, reference_disabled
from ..packing import Packed
from ..training.step import score


class Reference:
    """Scores a packed batch under the policy as it was before training.

    Build it before the first update and before a checkpoint is loaded into `model`.
    """

    def __init__(self, model: nn.Module):
        self.adapted = is_adapted(model)
        self.model = model if self.adapted else copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def score(self, packed: Packed, *, temperature: float = 1.0) -> Tensor:
        """Log-probs [N] fp32 (nats) of the packed targets."""
        if not self.adapted:
            return score(self.model, packed, temperature=temperature)
        with reference_disabled(self.model):
            return score(self.model, packed, temperature=temperature)
