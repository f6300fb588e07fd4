"""A second copy of a model's weights that stands still while the first is trained."""

from __future__ import annotations

import copy

import torch
from torch import nn


class ModelCopy:
    """A copy of a model whose weights change in `refresh` alone.

    What is not trained is shared where it lies on the same device: the copy of a LoRA policy costs its adapter. The buffers of the
    rest are allocated once, in the model's dtypes (of a bf16 weight the sampler reads what the model computes with, no fp32 tail).

    Args:
        model: a causal LM, or a PEFT model around one.
        device: where the copy lies; None: where the model does.

    Attributes:
        model: the copy, in eval mode and without gradients.
    """

    def __init__(self, model: nn.Module, device: torch.device | None = None) -> None:
        first = next(model.parameters())
        self.device = first.device if device is None else device
        shared = {id(p): p for p in model.parameters() if not p.requires_grad} if self.device == first.device else {}
        self.model = copy.deepcopy(model, shared)
        pairs = zip(model.parameters(), self.model.parameters(), strict=True)
        self._pairs = [(theirs, own) for theirs, own in pairs if theirs.requires_grad]
        self.model.requires_grad_(False).eval()
        if self.device != first.device:
            self.model.to(self.device)  # its parameters stay the same objects

    @property
    def num_bytes(self) -> int:
        """Memory of its own."""
        return sum(own.numel() * own.element_size() for _, own in self._pairs)

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes the weights over as they are, in place; nothing is allocated."""
        torch._foreach_copy_([own for _, own in self._pairs], [theirs for theirs, _ in self._pairs])
