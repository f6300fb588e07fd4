"""What an unpaired preference update minimizes: a row of the table over labelled completions, in two phases where it needs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import catalogue
from ..losses.checks import single_plan
from ..losses.packed import unpaired_loss
from ..losses.unpaired import UNPAIRED, UnpairedLoss
from ..ops.linear_loss import units_of
from ..ops.preference_reference import Side, sums_of
from ..packing import Packed
from ..training.step import MicroBatch, score
from .arguments import Arguments


@dataclass(frozen=True)
class LabelBatch:
    """Packed completions and what is known of them.

    Attributes:
        packed: B trees of one sequence each.
        members: [B] where each stands in the optimizer step's batch.
        labels: [B] bool, True for a desirable completion; on the CPU.
        ref_logp: [N] the reference's log-probs of the scored tokens.
    """

    packed: Packed
    members: Tensor
    labels: Tensor
    ref_logp: Tensor

    def side(self, model: nn.Module) -> Side:
        """[B] sums under the model, no gradient, fp64."""
        logp = score(model, self.packed)
        return sums_of(logp, self.ref_logp.to(logp.device), self.packed.cu_targets.to(logp.device), per_token=True)


@dataclass(frozen=True)
class LabelObjective:
    """A row and its options, numbers all."""

    name: str
    options: Mapping[str, float]

    SUMS: ClassVar[tuple[str, ...]] = (
        *("num_chosen", "rewards_chosen", "logps_chosen", "num_rejected", "rewards_rejected", "logps_rejected"),
        "right",
    )

    @property
    def row(self) -> UnpairedLoss:
        return UNPAIRED[self.name]

    @property
    def batch_options(self) -> tuple[str, ...]:
        """The options that are numbers of the whole batch."""
        return () if self.row.statistics is None else tuple(self.row.statistics(_one(), torch.ones(1, dtype=torch.bool)))

    @property
    def in_two_phases(self) -> bool:
        """Whether they have to be computed: there are some, and they are not given."""
        return any(name not in self.options for name in self.batch_options)

    @property
    def reads_mismatched(self) -> bool:
        """Whether they are numbers of mismatched pairs, not of the batch's own."""
        if not self.in_two_phases or self.row.statistics is None:
            return False
        label = torch.ones(1, dtype=torch.bool)
        far = replace(_one(), logp=torch.ones(1, dtype=torch.float64))
        return self.row.statistics(_one(), label) != self.row.statistics(_one(), label, mismatched=far)

    def statistics(
        self, model: nn.Module, batches: Sequence[LabelBatch], mismatched: Sequence[LabelBatch], previous: float | None
    ) -> dict[str, float]:
        """Numbers of the whole batch; {} without a forward where the row has none.

        Args:
            mismatched: pairs of prompts with other prompts' completions; where the row reads them, they alone are forwarded.
            previous: the number that the batch before left.
        """
        if not self.in_two_phases or self.row.statistics is None:
            return {}
        read = mismatched if self.reads_mismatched else batches
        if not read:
            return dict.fromkeys(self.batch_options, 0.0)
        side, labels = _joined([batch.side(model) for batch in read]), torch.cat([batch.labels for batch in read])
        before = None if previous is None else torch.tensor(previous, dtype=torch.float64)
        given = {"mismatched": side} if self.reads_mismatched else {}
        found = self.row.statistics(side, labels.to(side.logp.device), previous=before, **given, **self.options)
        return {name: float(value) for name, value in found.items()}

    def micro_batch(self, batch: LabelBatch, num: int, statistics: Mapping[str, float]) -> MicroBatch:
        """The batch's share of the mean over `num` completions, and the sums of its metrics by label."""
        cu, options = batch.packed.cu_targets, {**self.options, **statistics}

        def objective(logp: Tensor, entropy: Tensor, span: slice) -> tuple[Tensor, dict[str, Tensor]]:
            own = units_of(span, cu)
            labels = batch.labels[own].to(logp.device)
            here, ref = cu[own.start : own.stop + 1] - span.start, batch.ref_logp[span]
            losses, metrics = unpaired_loss(logp, here, labels, loss=self.name, options=options, ref_logp=ref)
            right = torch.where(labels, metrics["rewards"], -metrics["rewards"]) > 0
            sums: dict[str, Any] = {"num_chosen": labels.sum(), "num_rejected": (~labels).sum(), "right": right.sum()}
            for name, value in metrics.items():
                sums |= {f"{name}_chosen": value[labels].sum(), f"{name}_rejected": value[~labels].sum()}
            return losses.sum() / num, sums

        return MicroBatch(batch.packed, objective, cu)

    def metrics(self, sums: Mapping[str, float], statistics: Mapping[str, float]) -> dict[str, float]:
        """TRL's keys: means over the desirable and over the undesirable completions (absent where there is none), and the numbers of
        the batch, kl among them; rewards/accuracies is the share of completions whose reward has the sign of their label."""
        count = sums.get("num_chosen", 0.0) + sums.get("num_rejected", 0.0)
        found = {"rewards/accuracies": sums["right"] / count} if count else {}
        for kind in ("chosen", "rejected"):
            if count := sums.get(f"num_{kind}", 0.0):
                found |= {f"{name}/{kind}": sums[f"{name}_{kind}"] / count for name in ("rewards", "logps")}
        if "rewards/chosen" in found and "rewards/rejected" in found:
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found | {_SHOWN.get(name, name): value for name, value in statistics.items()}


_SHOWN = {"z_ref": "kl"}  # TRL's name of it


def _one() -> Side:
    zero = torch.zeros(1, dtype=torch.float64)
    return Side(zero, zero, zero + 1)


def _joined(sides: Sequence[Side]) -> Side:
    ref = torch.cat([side.ref_logp for side in sides if side.ref_logp is not None])
    return Side(torch.cat([s.logp for s in sides]), ref, torch.cat([s.length for s in sides]))


def objective_of(args: Arguments) -> LabelObjective:
    """The objective that the flags name.

    Raises:
        ValueError: an unknown row or option, a value out of range, a flag that the row does not read.
    """
    given = args.unpaired
    if given.loss not in UNPAIRED:
        raise ValueError(f"--loss: {catalogue.nearest(given.loss, UNPAIRED)}")
    weights = {"desirable_weight": given.desirable_weight, "undesirable_weight": given.undesirable_weight}
    options = weights | ({} if given.beta is None else {"beta": given.beta}) | dict(args.loss_options)
    for option, value in options.items():
        if option not in UNPAIRED[given.loss].options:
            raise ValueError(f"--loss.{option}: {catalogue.nearest(option, UNPAIRED[given.loss].options)}")
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"--loss.{option}: expected a number, got {value!r}")
    single_plan(given.loss, options)  # raises for values out of range
    if not any(value for value in weights.values()):
        raise ValueError("--desirable_weight and --undesirable_weight are both 0: there is nothing to learn")
    return LabelObjective(given.loss, options)
