"""What a preference update minimizes: a weighted sum of rows of the table, pair by pair.

A row that needs numbers of the whole batch gets them from a scoring pass without gradients over all micro-batches; where no row
does, there is no such pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import catalogue
from ..losses.checks import pair_plan
from ..losses.packed import preference_objective, wpo_weights
from ..losses.preference import PREFERENCE, PairLoss
from ..ops.linear_loss import units_of
from ..ops.preference_reference import Side, pairs_of, sums_of
from ..packing import Packed
from ..training.step import MicroBatch, score
from .arguments import Arguments, PreferenceArguments


@dataclass(frozen=True)
class PairBatch:
    """Packed pairs and what is known of them.

    Attributes:
        packed: B trees of two sequences each, chosen first.
        members: [B] where each pair stands in the optimizer step's batch.
        ref_logp: [N] the reference's log-probs of the scored tokens; None: no row reads one.
        margin: [B] or None.
        probability: [B] that the chosen completion is the better one, or None: certain.
    """

    packed: Packed
    members: Tensor
    ref_logp: Tensor | None = None
    margin: Tensor | None = None
    probability: Tensor | None = None


@dataclass(frozen=True)
class Term:
    """A row with its weight in the sum and its own options, numbers all.

    Attributes:
        divergence, divergence_alpha: the f-divergence to the reference; "reverse_kl" for rows that read none.
    """

    name: str
    weight: float
    options: Mapping[str, float]
    divergence: str = "reverse_kl"
    divergence_alpha: float = 0.5

    @property
    def row(self) -> PairLoss:
        return PREFERENCE[self.name]

    @property
    def batch_options(self) -> tuple[str, ...]:
        """The options that are numbers of the whole batch."""
        if self.row.statistics is None:
            return ()
        one = torch.zeros(1, dtype=torch.float64)
        side = Side(one, one, one + 1)
        return tuple(self.row.statistics(side, side))

    @property
    def in_two_phases(self) -> bool:
        """Whether they have to be computed: there are some, and they are not given."""
        return any(name not in self.options for name in self.batch_options)


@dataclass(frozen=True)
class PairObjective:
    """The whole of it.

    Attributes:
        terms: what is summed.
        ld_alpha: what a token past the length of the pair's shorter completion counts.
        weighting: whether each pair is weighed by how likely it is under the policy (WPO, arXiv:2406.11827, Eq. 2).
    """

    terms: tuple[Term, ...]
    ld_alpha: float = 1.0
    weighting: bool = False

    @property
    def reads_reference(self) -> bool:
        return any(term.row.reference for term in self.terms)

    @property
    def reads_margin(self) -> bool:
        return any(term.row.margin for term in self.terms)

    @property
    def reads_probability(self) -> bool:
        """Whether each row does that compares the completions, and none has a label_smoothing of its own."""
        plans = [pair_plan(term.name, term.options, "reverse_kl", 0.5) for term in self.terms]
        rows = [term for term, plan in zip(self.terms, plans, strict=True) if plan.formula.name != "none"]
        return bool(rows) and all(term.row.soft and "label_smoothing" not in term.options for term in rows)

    @property
    def shown(self) -> int:
        """The term whose rewards are reported: the first with a reference, else the first that compares scores."""
        formulas = [pair_plan(term.name, term.options, "reverse_kl", 0.5).formula.name for term in self.terms]
        return min(range(len(formulas)), key=lambda k: (not self.terms[k].row.reference, formulas[k] == "none"))

    def statistics(self, model: nn.Module, batches: Sequence[PairBatch], carried: Mapping[str, float]) -> dict[str, dict[str, Any]]:
        """Numbers of the whole batch by row, [B] in the batch's order or a number each; {} without a forward where no row has any.

        Args:
            carried: the numbers that a row's previous batch left, by row.
        """
        rows = [term for term in self.terms if term.in_two_phases]
        if not rows:
            return {}
        sides = [self._sides(score(model, b.packed), b) for b in batches]
        places = torch.cat([batch.members for batch in batches]).argsort()
        win, lose = (_joined([pair[k] for pair in sides], places) for k in (0, 1))
        found = {}
        for term in rows:
            previous = torch.tensor(carried[term.name], dtype=torch.float64) if term.name in carried else None
            assert term.row.statistics is not None
            values = term.row.statistics(win, lose, previous=previous, **term.options)
            found[term.name] = {name: value if value.dim() else float(value) for name, value in values.items()}
        return found

    def _sides(self, logp: Tensor, batch: PairBatch) -> tuple[Side, Side]:
        cu = batch.packed.cu_targets.to(logp.device)
        ref = None if batch.ref_logp is None else batch.ref_logp.to(logp.device)
        return pairs_of(sums_of(logp, ref, cu, per_token=True, tail=self.ld_alpha), None, None)

    def micro_batch(self, batch: PairBatch, num_pairs: int, statistics: Mapping[str, Mapping[str, Any]]) -> MicroBatch:
        """The batch's share of the mean over `num_pairs` pairs, and the sums of its metrics."""
        cu, shown = batch.packed.cu_targets, self.shown
        units = cu[::2].contiguous()
        device = batch.packed.targets.device
        weights = torch.ones(len(units) - 1, dtype=torch.float64, device=device) if self.weighting else None
        squares = torch.empty(len(batch.packed.targets), device=device) if self.weighting else None
        shares = [self._share(term, batch, num_pairs, weights, statistics.get(term.name, {})) for term in self.terms]

        def objective(logp: Tensor, entropy: Tensor, span: slice) -> tuple[Tensor, dict[str, Tensor]]:
            if weights is not None and squares is not None:
                pairs = units_of(span, units)
                weights[pairs] = wpo_weights(logp, cu[2 * pairs.start : 2 * pairs.stop + 1] - span.start, squares[span]).double()
            found = [share(logp, span) for share in shares]
            sums = {name: value for _, metrics in found for name, value in metrics.items()} | found[shown][1]
            return torch.stack([term.weight * part for term, (part, _) in zip(self.terms, found, strict=True)]).sum(), sums

        return MicroBatch(batch.packed, objective, units, squares)

    def _share(
        self, term: Term, batch: PairBatch, num_pairs: int, weights: Tensor | None, numbers: Mapping[str, Any]
    ) -> Callable[[Tensor, slice], tuple[Tensor, dict[str, Tensor]]]:
        own = {name: value[batch.members] if isinstance(value, Tensor) else value for name, value in numbers.items()}
        if batch.probability is not None and term.row.soft:
            own["label_smoothing"] = 1 - batch.probability
        objective, _ = preference_objective(
            batch.packed.cu_targets,
            num_pairs=num_pairs,
            loss=term.name,
            options={**term.options, **own},
            ref_logp=batch.ref_logp if term.row.reference else None,
            margin=batch.margin if term.row.margin else None,
            weight=weights,
            divergence=term.divergence,
            divergence_alpha=term.divergence_alpha,
            ld_alpha=self.ld_alpha,
        )
        return objective


def _joined(sides: Sequence[Side], places: Tensor) -> Side:
    """The sides of all micro-batches as one, in the order of the batch."""
    places = places.to(sides[0].logp.device)
    ref = None if sides[0].ref_logp is None else torch.cat([side.ref_logp for side in sides if side.ref_logp is not None])[places]
    return Side(torch.cat([s.logp for s in sides])[places], ref, torch.cat([s.length for s in sides])[places])


def objective_of(args: Arguments) -> PairObjective:
    """The objective that the flags name.

    Raises:
        ValueError: an unknown row or option, weights that do not fit the losses, a value out of range, a flag that no row reads.
    """
    given, names = args.preference, args.preference.loss
    if not names or len(set(names)) < len(names):
        raise ValueError(f"--loss: expected different rows of the table, got {' '.join(names) or 'none'}")
    for name in names:
        if name not in PREFERENCE:
            raise ValueError(f"--loss: {catalogue.nearest(name, PREFERENCE)}")
    weights = given.loss_weights or [1.0] * len(names)
    if len(weights) != len(names):
        raise ValueError(f"--loss_weights: expected one a loss ({len(names)}: {' '.join(names)}), got {len(weights)}")
    if not (all(0 <= weight < math.inf for weight in weights) and any(weights)):
        raise ValueError(f"--loss_weights: expected finite numbers >= 0, not all of them 0, got {' '.join(map(str, weights))}")
    options = {name: value for name in ("beta", "label_smoothing") if (value := getattr(given, name)) is not None} | dict(args.loss_options)
    _check_read(options, names, given)
    terms = tuple(_term(name, weight, options, given) for name, weight in zip(names, weights, strict=True))
    return PairObjective(terms, given.ld_alpha, given.use_weighting)


def _term(name: str, weight: float, options: Mapping[str, Any], given: PreferenceArguments) -> Term:
    row = PREFERENCE[name]
    divergence = given.f_divergence_type if row.divergence else "reverse_kl"
    own = {option: value for option, value in options.items() if option in row.options}
    pair_plan(name, own, divergence, given.f_alpha_divergence_coef)  # raises for values out of range
    return Term(name, weight, own, divergence, given.f_alpha_divergence_coef)


def _check_read(options: Mapping[str, Any], names: Sequence[str], given: PreferenceArguments) -> None:
    """Nothing that is given may be ignored."""
    readable = {option for name in names for option, default in PREFERENCE[name].options.items() if default is not None}
    for option, value in options.items():
        flag = f"--{option}" if option in vars(given) and option not in ("loss",) else f"--loss.{option}"
        if option not in readable:
            raise ValueError(f"{flag}: {' '.join(names)} reads no {option}; its options are {', '.join(sorted(readable)) or 'none'}")
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"{flag}: expected a number, got {value!r}")
    if given.f_divergence_type != "reverse_kl" and not any(PREFERENCE[name].divergence for name in names):
        readers = ", ".join(name for name, row in PREFERENCE.items() if row.divergence)
        raise ValueError(f"--f_divergence_type {given.f_divergence_type}: {' '.join(names)} reads no divergence; these do: {readers}")
    sorting = [name for name in names if PREFERENCE[name].couples_pairs]
    if given.use_weighting and sorting:
        raise ValueError(f"--use_weighting: {' '.join(sorting)} compares completions of different pairs, which have no weight in common")
