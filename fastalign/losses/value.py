"""The critic's loss."""

from __future__ import annotations

import torch
from torch import Tensor


def value_loss(values: Tensor, returns: Tensor, old_values: Tensor | None = None, *, clip: float | None = None) -> Tensor:
    """½ max((V - R)², (V_old + clip(V - V_old, ±ε) - R)²): PPO's clipped value loss, as its authors' code has it (TRL and verl, too).

    Args:
        values: [N], differentiable; returns: [N] what they are to become; old_values: [N] those of the time of sampling.
        clip: ε; None, or no old_values: ½ (V - R)².

    Returns:
        [N] losses. Aggregation over tokens is the caller's.
    """
    error = (values - returns).square()
    if clip is not None and old_values is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (near - returns).square())
    return 0.5 * error
