"""f-divergences to the reference in place of the reverse KL (arXiv:2309.16240, Table 1): what a pair loss takes for the log-ratio."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

HIGHEST = 80.0  # exponents above it are cut: a difference of two infinities would be NaN


def power(x: Tensor, exponent: float) -> Tensor:
    """(e^(exponent · x) - 1) / exponent, in the limit x; exponents above 80 count as 80."""
    return x if exponent == 0.0 else torch.expm1((exponent * x).clamp(max=HIGHEST)) / exponent


def reverse_kl(logratio: Tensor, *, alpha: float = 0.5) -> Tensor:
    """f'(t) = log t + 1: the log-ratio itself. The loss's own equation."""
    return logratio


def forward_kl(logratio: Tensor, *, alpha: float = 0.5) -> Tensor:
    """f'(t) = 1 - 1/t."""
    return power(logratio, -1.0)


def js(logratio: Tensor, *, alpha: float = 0.5) -> Tensor:
    """f'(t) = log(2t / (1 + t)), below log 2."""
    return math.log(2.0) + F.logsigmoid(logratio)


def alpha_divergence(logratio: Tensor, *, alpha: float = 0.5) -> Tensor:
    """f'(t) = (t^(alpha - 1) - 1) / (alpha - 1) as TRL writes it; the paper's alpha is 1 - this one. alpha = 1: the reverse KL."""
    return power(logratio, alpha - 1.0)


@dataclass(frozen=True)
class Divergence:
    """A row: the score as a function of the log-ratio, and as a transform of csrc/math/preference.h with the power alpha → number."""

    function: Callable[..., Tensor]
    transform: str
    power: Callable[[float], float] = lambda alpha: 0.0


DIVERGENCES: dict[str, Divergence] = {
    "reverse_kl": Divergence(reverse_kl, "identity"),
    "forward_kl": Divergence(forward_kl, "power", lambda alpha: -1.0),
    "js": Divergence(js, "js"),
    "alpha": Divergence(alpha_divergence, "power", lambda alpha: alpha - 1.0),
}
