"""What several preference equations share: scores of a pair and the smoothed logistic loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign.ops.preference_reference import Side


def defaults(function: Callable[..., Tensor]) -> dict[str, Any]:
    """An equation's own options and what they are when they are not given."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def gap(win: Side, lose: Side, beta: float) -> Tensor:
    """β Δ - margin."""
    return _less_margin(beta * (win.logratio - lose.logratio), win)


def mean_gap(win: Side, lose: Side, beta: float) -> Tensor:
    """The same of log-ratios a token."""
    return _less_margin(beta * (win.mean_logratio - lose.mean_logratio), win)


def policy_gap(chosen: Tensor, rejected: Tensor, win: Side, beta: float, gamma: float = 0.0) -> Tensor:
    """β (chosen - rejected) - γ - margin of scores without a reference."""
    return _less_margin(beta * (chosen - rejected) - gamma, win)


def _less_margin(z: Tensor, win: Side) -> Tensor:
    return z if win.margin is None else z - win.margin


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x); torch's own softplus is off by 2e-9 above its threshold."""
    return -F.logsigmoid(-x)


def flip_share(loss: str, label_smoothing: float, *, low: float, high: float) -> float:
    """label_smoothing, checked to lie in the open interval that the equation is defined on."""
    if not low < label_smoothing < high:
        raise ValueError(f"{loss}: label_smoothing must lie between {low} and {high}, both excluded, got {label_smoothing}")
    return label_smoothing


def smoothed(z: Tensor, label_smoothing: float | Tensor) -> Tensor:
    """-(1 - ε) log σ(z) - ε log σ(-z); ε one number, or [B] one a pair."""
    if isinstance(label_smoothing, Tensor):
        label_smoothing = label_smoothing.to(z)
    elif label_smoothing == 0.0:
        return softplus(-z)
    return (1 - label_smoothing) * softplus(-z) + label_smoothing * softplus(z)


def nll(win: Side) -> Tensor:
    """Negative log-likelihood of the chosen completion a token."""
    return -win.mean_logp


def reward_shift(chosen: Tensor, rejected: Tensor, previous: Tensor | None, decay: float) -> Tensor:
    """BCO's δ = ½ (mean chosen reward + mean rejected reward), as a moving average over batches (arXiv:2404.04656).

    A kind that the batch does not have leaves δ to the other; a batch with neither leaves it as it was. TRL takes the running mean over
    all rewards, whichever kind they are.
    """
    means = [x.detach().mean() for x in (chosen, rejected) if x.numel()]
    if not means:
        return chosen.new_zeros(()) if previous is None else previous
    here = torch.stack(means).mean()
    return here if previous is None else decay * previous + (1 - decay) * here
