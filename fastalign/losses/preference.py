"""The table of preference losses: equations over pairs, [B] in, [B] out.

Each takes the chosen and the rejected `Side` (sums over completions) and its own keyword options. The functions know no weights; a row,
called, multiplies by those of its sides. `fastalign.preference_loss` is the same from packed per-token log-probs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastalign.ops.preference import Formula
from fastalign.ops.preference_reference import Side

from .divergences import DIVERGENCES
from .scores import defaults, flip_share
from .with_reference import (
    aot,
    aot_statistics,
    aot_unpaired,
    aot_unpaired_statistics,
    apo_down,
    apo_zero,
    bco_pair,
    bco_statistics,
    discopop,
    dpo,
    dpo_norm,
    exo_pair,
    hinge,
    ipo,
    ipo_avg,
    nca_pair,
    robust,
    rso,
    spin,
    sppo_hard,
)
from .without_reference import alphapo, cpo, cpo_simpo, orpo, orpo_metrics, sft, simpo, slic

__all__ = ["DIVERGENCES", "PREFERENCE", "PairLoss", "Side", "mixture"]


@dataclass(frozen=True)
class PairLoss:
    """A row.

    Attributes:
        function: the equation.
        formula: its options → the formula that the kernels evaluate; `Formula(beta=...)` alone: the torch function runs.
        reference: whether it reads reference log-probs.
        per_token: whether its scores are divided by the completions' lengths.
        margin: whether it reads the pair's margin.
        divergence: whether an f-divergence may take the reverse KL's place.
        soft: whether label_smoothing may be [B], one number a pair.
        statistics: what must be known of the whole batch: detached sides → keyword arguments of the function. Tensors [B] go with
            the pairs, scalars with the batch. None: nothing.
        metrics: detached sides → metrics [B] of its own.
        options: its keyword options and what they are when not given.
    """

    function: Callable[..., Tensor]
    formula: Callable[..., Formula]
    reference: bool = True
    per_token: bool = False
    margin: bool = False
    divergence: bool = False
    soft: bool = False
    statistics: Callable[..., dict[str, Tensor]] | None = None
    metrics: Callable[[Side, Side], dict[str, Tensor]] | None = None
    options: Mapping[str, Any] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", defaults(self.function))

    def __call__(
        self, win: Side, lose: Side, *, divergence: str = "reverse_kl", divergence_alpha: float = 0.5, **options: float | Tensor
    ) -> Tensor:
        """[B] losses times the weights of both sides."""
        losses = self.unweighted(win, lose, divergence, divergence_alpha, **options)
        for weight in (win.weight, lose.weight):
            losses = losses if weight is None else losses * weight
        return losses

    def unweighted(self, win: Side, lose: Side, divergence: str, divergence_alpha: float, **options: float | Tensor) -> Tensor:
        """[B] losses. An f-divergence takes the place of the log-ratio."""
        if divergence != "reverse_kl":
            score = DIVERGENCES[divergence].function
            win, lose = (replace(s, logp=score(s.logratio, alpha=divergence_alpha), ref_logp=None) for s in (win, lose))
        return self.function(win, lose, **options)

    @property
    def couples_pairs(self) -> bool:
        """Whether a pair's loss depends on the pairs at hand where the numbers of the whole batch are not given."""
        return self.statistics is not None and None in self.options.values()


Parts = tuple[tuple[PairLoss, float, tuple[tuple[str, Any], ...]], ...]  # (row, weight, its options as items)


@dataclass(frozen=True)
class Mixture(PairLoss):
    """A weighted sum of rows; a divergence concerns the rows that have a reference."""

    parts: Parts = ()

    def unweighted(self, win: Side, lose: Side, divergence: str, divergence_alpha: float, **options: float | Tensor) -> Tensor:
        """[B] losses."""
        return _sum_of(self.parts, win, lose, divergence, divergence_alpha)

    @property
    def couples_pairs(self) -> bool:
        """Whether one of its rows does."""
        return any(row.couples_pairs for row, _, _ in self.parts)


def mixture(parts: Mapping[str, float], options: Mapping[str, Mapping[str, float]] | None = None) -> PairLoss:
    """A row that is the weighted sum of rows: mixture({"dpo": 0.8, "sft": 0.2}, {"dpo": {"beta": 0.05}}).

    Its reward metrics are those of one part: the first that reads a reference, else the first that compares scores at all.

    Raises:
        ValueError: a name is unknown, or options are given for a row that is not a part.
    """
    given = dict(options or {})
    unknown = sorted((set(parts) - set(PREFERENCE)) | (set(given) - set(parts)))
    if unknown or not parts:
        raise ValueError(f"mixture: expected rows out of {', '.join(PREFERENCE)}, and options for its parts alone; got {unknown or parts}")
    rows = {name: PREFERENCE[name] for name in parts}
    formulas = [row.formula(**{**row.options, **given.get(name, {})}) for name, row in rows.items()]
    rewards = min(zip(rows.values(), formulas, strict=True), key=lambda part: (not part[0].reference, part[1].name == "none"))[1]
    members = tuple((rows[name], weight, tuple(given.get(name, {}).items())) for name, weight in parts.items())
    return Mixture(
        functools.partial(_sum_of, members),
        lambda: Formula(beta=rewards.beta, per_token=rewards.per_token),
        reference=any(row.reference for row in rows.values()),
        per_token=rewards.per_token,
        margin=any(row.margin for row in rows.values()),
        divergence=all(row.divergence or not row.reference for row in rows.values()),
        parts=members,
    )


def _sum_of(parts: Parts, win: Side, lose: Side, divergence: str = "reverse_kl", divergence_alpha: float = 0.5) -> Tensor:
    """[B] losses of a mixture."""
    losses = [
        weight * row.unweighted(win, lose, divergence if row.divergence else "reverse_kl", divergence_alpha, **dict(given))
        for row, weight, given in parts
    ]
    return torch.stack(losses).sum(0)


def _logistic(beta: float, label_smoothing: float = 0.0, gamma: float = 0.0, nll_coef: float = 0.0, *, per_token: bool = False) -> Formula:
    return Formula("logistic", beta, 1 - label_smoothing, label_smoothing, gamma, nll_coef, per_token)


def _robust(beta: float, label_smoothing: float) -> Formula:
    scale = 1 / (1 - 2 * flip_share("robust", label_smoothing, low=-1.0, high=0.5))
    return Formula("logistic", beta, scale * (1 - label_smoothing), -scale * label_smoothing)


def _exo_pair(beta: float, label_smoothing: float) -> Formula:
    return Formula("exo", beta, flip_share("exo_pair", label_smoothing, low=0.0, high=1.0))


def _alphapo(beta: float, gamma: float, alpha: float, label_smoothing: float) -> Formula:
    plain = _logistic(beta, label_smoothing, gamma, per_token=True)
    return replace(plain, transform="power", power=-alpha) if alpha else plain


def _plain(name: str, *, per_token: bool = False) -> Callable[..., Formula]:
    return lambda beta: Formula(name, beta, per_token=per_token)


def _sorted(beta: float, label_smoothing: float, **_matched: Tensor) -> Formula:
    return Formula(beta=beta)


PREFERENCE: dict[str, PairLoss] = {
    "dpo": PairLoss(dpo, _logistic, margin=True, divergence=True, soft=True),
    "robust": PairLoss(robust, _robust, margin=True, divergence=True),
    "ipo": PairLoss(ipo, _plain("square"), divergence=True),
    "ipo_avg": PairLoss(ipo_avg, _plain("square", per_token=True), per_token=True),
    "hinge": PairLoss(hinge, _plain("hinge"), margin=True, divergence=True),
    "slic": PairLoss(slic, lambda delta, nll_coef: Formula("hinge", 1.0, delta, nll=nll_coef), reference=False, margin=True),
    "rso": PairLoss(rso, _logistic, margin=True, divergence=True),
    "spin": PairLoss(spin, _logistic, margin=True, divergence=True),
    "dpo_norm": PairLoss(dpo_norm, lambda beta: _logistic(beta, per_token=True), per_token=True, margin=True),
    "exo_pair": PairLoss(exo_pair, _exo_pair, margin=True, divergence=True),
    "nca_pair": PairLoss(nca_pair, _plain("nca")),
    "bco_pair": PairLoss(bco_pair, lambda beta, shift: Formula("bco", beta, target=float(shift)), statistics=bco_statistics),
    "sppo_hard": PairLoss(sppo_hard, _plain("sppo")),
    "aot": PairLoss(aot, _sorted, statistics=aot_statistics),
    "aot_unpaired": PairLoss(aot_unpaired, _sorted, statistics=aot_unpaired_statistics),
    "apo_zero": PairLoss(apo_zero, _plain("apo_zero")),
    "apo_down": PairLoss(apo_down, _plain("apo_down")),
    "discopop": PairLoss(discopop, lambda beta, tau: Formula("discopop", beta, tau), margin=True, divergence=True),
    "simpo": PairLoss(
        simpo,
        lambda beta, gamma, label_smoothing: _logistic(beta, label_smoothing, gamma, per_token=True),
        reference=False,
        per_token=True,
        margin=True,
        soft=True,
    ),
    "cpo": PairLoss(
        cpo,
        lambda beta, nll_coef, label_smoothing: _logistic(beta, label_smoothing, 0.0, nll_coef),
        reference=False,
        margin=True,
        soft=True,
    ),
    "cpo_simpo": PairLoss(
        cpo_simpo,
        lambda beta, gamma, nll_coef, label_smoothing: _logistic(beta, label_smoothing, gamma, nll_coef, per_token=True),
        reference=False,
        per_token=True,
        margin=True,
        soft=True,
    ),
    "alphapo": PairLoss(alphapo, _alphapo, reference=False, per_token=True, margin=True, soft=True),
    "orpo": PairLoss(
        orpo, lambda beta: Formula("orpo", beta, nll=1.0, per_token=True), reference=False, per_token=True, metrics=orpo_metrics
    ),
    "sft": PairLoss(sft, lambda: Formula("none", nll=1.0), reference=False),
}
