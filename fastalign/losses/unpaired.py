"""The table of unpaired preference losses: equations over completions that are desirable or not, [B] in, [B] out.

Each takes a `Side`, `labels` [B] bool (True: desirable) and its own keyword options. The functions know no weights of samples; a row,
called, multiplies by those of its side. `fastalign.unpaired_loss` is the same from packed per-token log-probs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastalign.ops.preference import Formula
from fastalign.ops.preference_reference import Side

from .scores import defaults, reward_shift, softplus


def kto(
    side: Side,
    labels: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    z_ref: float | Tensor = 0.0,
) -> Tensor:
    """KTO (arXiv:2402.01306, Eq. 8): λ (1 - σ(±β (log-ratio - z_ref))), + for desirable. Losses in (0, λ).

    z_ref ≥ 0 estimates the KL to the reference (`kto_statistics`); no gradient goes through it.
    """
    sign, weight = _signs(labels, side.logp, desirable_weight, undesirable_weight)
    return weight * torch.sigmoid(-sign * beta * (side.logratio - z_ref))


def kto_statistics(side: Side, labels: Tensor, *, mismatched: Side | None = None, **_options: float) -> dict[str, Tensor]:
    """{"z_ref": ...} of a whole batch: max(0, mean log-ratio of `mismatched`), which pairs each prompt with another prompt's completion.

    Without mismatched pairs it is 0. Over several processes or micro-batches, give the side of all of them.
    """
    if mismatched is None or not mismatched.logp.numel():
        return {"z_ref": side.logp.new_zeros(())}
    return {"z_ref": mismatched.logratio.detach().mean().clamp(min=0)}


def bco(
    side: Side,
    labels: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    shift: float | Tensor = 0.0,
) -> Tensor:
    """BCO (arXiv:2404.04656): -λ log σ(±(β log-ratio - δ)), + for desirable. Losses > 0. δ is the running reward shift."""
    sign, weight = _signs(labels, side.logp, desirable_weight, undesirable_weight)
    return weight * softplus(-sign * (beta * side.logratio - shift))


def bco_statistics(
    side: Side, labels: Tensor, *, beta: float = 0.1, previous: Tensor | None = None, decay: float = 0.9, **_options: float
) -> dict[str, Tensor]:
    """{"shift": δ} of a whole batch, to be kept and given as `previous` with the next one."""
    rewards = beta * side.logratio
    return {"shift": reward_shift(rewards[labels], rewards[~labels], previous, decay)}


def apo_zero_unpaired(
    side: Side, labels: Tensor, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Tensor:
    """APO-zero without pairs (arXiv:2408.06266, Eq. 7): λ σ(∓β log-ratio), - for desirable. Losses in (0, λ). KTO with z_ref = 0."""
    return kto(side, labels, beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)


def _signs(labels: Tensor, like: Tensor, desirable_weight: float, undesirable_weight: float) -> tuple[Tensor, Tensor]:
    desirable = labels.to(like.dtype)
    return 2 * desirable - 1, undesirable_weight + (desirable_weight - undesirable_weight) * desirable


@dataclass(frozen=True)
class UnpairedLoss:
    """A row: the equation, its options → the formula that the kernels evaluate, and what must be known of the whole batch
    (detached side and labels → keyword arguments of the function)."""

    function: Callable[..., Tensor]
    formula: Callable[..., Formula]
    statistics: Callable[..., dict[str, Tensor]] | None = None
    options: Mapping[str, Any] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", defaults(self.function))

    def __call__(self, side: Side, labels: Tensor, **options: float | Tensor) -> Tensor:
        """[B] losses times the weights of the side."""
        losses = self.function(side, labels, **options)
        return losses if side.weight is None else losses * side.weight


def _kto(beta: float, desirable_weight: float, undesirable_weight: float, z_ref: float | Tensor = 0.0) -> Formula:
    return Formula("kto", beta, desirable_weight, undesirable_weight, float(z_ref))


def _bco(beta: float, desirable_weight: float, undesirable_weight: float, shift: float | Tensor) -> Formula:
    return Formula("bco", beta, desirable_weight, undesirable_weight, float(shift))


UNPAIRED: dict[str, UnpairedLoss] = {
    "kto": UnpairedLoss(kto, _kto, kto_statistics),
    "bco": UnpairedLoss(bco, _bco, bco_statistics),
    "apo_zero_unpaired": UnpairedLoss(apo_zero_unpaired, _kto),
}
