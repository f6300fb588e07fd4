"""The table of supervised losses: equations over the log-probs of scored tokens."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastalign import catalogue

from .scores import defaults


def nll(logp: Tensor) -> Tensor:
    """Negative log-likelihood. logp [N] in nats → [N]."""
    return -logp


def dft(logp: Tensor) -> Tensor:
    """Dynamic fine-tuning (arXiv:2508.05629): -sg(p) log p with p = e^logp. logp [N] in nats → [N] in [0, 1/e].

    The gradient of -log p is that of a policy with reward 1/p; times p, detached, it is that of a reward of 1 whatever the token.
    """
    return -logp.detach().exp() * logp


def rrhf(
    logp: Tensor, cu_targets: Tensor, cu_groups: Tensor, scores: Tensor, *, length_penalty: float = 1.0, sft_coef: float = 1.0
) -> Tensor:
    """RRHF (arXiv:2304.05302): the ranking of a prompt's completions by likelihood is taught the ranking of their scores.

    With p_i = (Σ_t log p_i,t) / |y_i|^length_penalty of completion i with score r_i, a group's loss is
    Σ_{r_i < r_j} max(0, p_i - p_j) + sft_coef · Σ_t -log p_best,t, best being the first completion with the highest score.

    Args:
        logp: [N] in nats, completion by completion.
        cu_targets: [B+1] offsets of the completions in `logp`; an empty completion has p = 0.
        cu_groups: [P+1] offsets of the groups in the completions.
        scores: [B], higher is better.
        length_penalty: 1: log-probs a token (the paper); 0: sums.
        sft_coef: weight of the best completion's negative log-likelihood; 1 in the paper.

    Returns:
        [P] losses of the groups.
    """
    lengths = cu_targets.diff().to(logp.device)
    sums = logp.new_zeros(lengths.numel()).index_add(0, torch.repeat_interleave(lengths), logp)
    means = sums / lengths.clamp(min=1).to(logp.dtype) ** length_penalty
    found = []
    for start, stop in zip(cu_groups[:-1].tolist(), cu_groups[1:].tolist(), strict=True):
        p, r = means[start:stop], scores[start:stop].to(logp.device)
        worse = r[:, None] < r[None, :]
        found.append(((p[:, None] - p[None, :]).clamp(min=0) * worse).sum() - sft_coef * sums[start + int(r.argmax())])
    return torch.stack(found)


@dataclass(frozen=True)
class SupervisedLoss:
    """A row.

    Attributes:
        function: the equation; of tokens, logp [N] → [N], or of groups, as `rrhf`.
        ranks: whether its unit is a prompt's group of scored completions.
        options: its keyword options and what they are when not given.
    """

    function: Callable[..., Tensor]
    ranks: bool = False
    options: Mapping[str, Any] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", defaults(self.function))


SUPERVISED = {"nll": SupervisedLoss(nll), "dft": SupervisedLoss(dft), "rrhf": SupervisedLoss(rrhf, ranks=True)}


def supervised_loss(name: str, options: Mapping[str, Any] | None = None) -> SupervisedLoss:
    """The row with its options set.

    Raises:
        ValueError: an unknown name or option, or an option that is no finite number >= 0.
    """
    if name not in SUPERVISED:
        raise ValueError(f"--loss: {catalogue.nearest(name, SUPERVISED)}")
    row, given = SUPERVISED[name], dict(options or {})
    for key, value in given.items():
        if key not in row.options:
            raise ValueError(f"--loss.{key}: {name} has {', '.join(f'--loss.{own}' for own in row.options) or 'no arguments of its own'}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise ValueError(f"--loss.{key}: expected a finite number >= 0, got {value!r}")
    return SupervisedLoss(functools.partial(row.function, **given), row.ranks)
