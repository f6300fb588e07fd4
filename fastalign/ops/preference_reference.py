"""The specification of the preference ops in plain torch: sums over packed sequences, and the two sides that equations read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Side:
    """The chosen or the rejected completions of B pairs (or B completions on their own), as an equation reads them.

    Attributes:
        logp: [B] sum of the log-probs (nats) of the completion's tokens.
        ref_logp: [B] the same under the reference, None where there is no reference.
        length: [B] scored tokens.
        weight: [B] what the loss is multiplied by (a pair's weight is the product of its sides'), None: 1.
        margin: [B] on the chosen side, what a pair's rewards must differ by; None: 0.
    """

    logp: Tensor
    ref_logp: Tensor | None
    length: Tensor
    weight: Tensor | None = None
    margin: Tensor | None = None

    @property
    def logratio(self) -> Tensor:
        """[B] logp - ref_logp; logp where there is no reference."""
        return self.logp if self.ref_logp is None else self.logp - self.ref_logp

    @property
    def num_tokens(self) -> Tensor:
        """[B] the length in the dtype of logp, at least 1: an empty completion divides by 1."""
        return self.length.clamp(min=1).to(self.logp.dtype)

    @property
    def mean_logp(self) -> Tensor:
        """[B] log-prob a token."""
        return self.logp / self.num_tokens

    @property
    def mean_logratio(self) -> Tensor:
        """[B] log-ratio a token."""
        return self.logratio / self.num_tokens


def segment_sums(values: Tensor, cu_targets: Tensor, *, tail: float = 1.0) -> Tensor:
    """Sums over packed sequences, fp64.

    Args:
        values: [N].
        cu_targets: [S+1] offsets on the device of the values.
        tail: what a token past the length of its pair's shorter completion counts; sequences 2i and 2i+1 are a pair.

    Returns:
        [S] fp64, differentiable.
    """
    tokens = torch.arange(values.shape[0], device=values.device)
    sequence = torch.bucketize(tokens, cu_targets[1:], right=True)
    values = values.double()
    if tail != 1.0:
        head = cu_targets.diff().view(-1, 2).amin(1).repeat_interleave(2)
        values = torch.where(tokens - cu_targets[sequence] < head[sequence], values, tail * values)
    return values.new_zeros(cu_targets.shape[0] - 1).index_add(0, sequence, values)


def sums_of(logp: Tensor, ref_logp: Tensor | None, cu_targets: Tensor, *, per_token: bool, tail: float = 1.0) -> Side:
    """All S sequences as one side, fp64. `per_token`: ref_logp is [N], else [S]."""
    ref = ref_logp.detach() if ref_logp is not None else None
    if ref is not None:
        ref = segment_sums(ref, cu_targets, tail=tail) if per_token else ref.double()
    return Side(segment_sums(logp, cu_targets, tail=tail), ref, cu_targets.diff())


def pairs_of(sequences: Side, margin: Tensor | None, weight: Tensor | None) -> tuple[Side, Side]:
    """The chosen and the rejected side: sequences 2i and 2i+1."""

    def side(start: int, **pairs: Tensor | None) -> Side:
        ref = None if sequences.ref_logp is None else sequences.ref_logp[start::2]
        return Side(sequences.logp[start::2], ref, sequences.length[start::2], **pairs)

    wide = [None if t is None else t.detach().double() for t in (weight, margin)]
    return side(0, weight=wide[0], margin=wide[1]), side(1)


def pair_metrics(win: Side, lose: Side, *, beta: float, per_token: bool) -> Tensor:
    """[6, B] rewards of chosen and rejected, their margin, whether it is > 0, log-probs of chosen and rejected."""
    chosen, rejected = (beta * (side.mean_logratio if per_token else side.logratio).detach() for side in (win, lose))
    return torch.stack((chosen, rejected, chosen - rejected, (chosen > rejected).double(), win.logp.detach(), lose.logp.detach()))


def pair_losses(
    equation: Callable[[Side, Side], Tensor],
    logp: Tensor,
    ref_logp: Tensor | None,
    cu_targets: Tensor,
    margin: Tensor | None,
    weight: Tensor | None,
    *,
    ref_per_token: bool,
    beta: float,
    per_token: bool,
    tail: float,
) -> tuple[Tensor, Tensor]:
    """Losses [B] and metrics [6, B] of an equation over sums taken in fp64, rounded to the dtype of logp at the end."""
    sequences = sums_of(logp, ref_logp, cu_targets, per_token=ref_per_token, tail=tail)
    win, lose = pairs_of(sequences, margin, weight)
    metrics = pair_metrics(win, lose, beta=beta, per_token=per_token)
    return equation(win, lose).to(logp.dtype), metrics.to(logp.dtype)


def single_losses(
    equation: Callable[[Side, Tensor], Tensor],
    logp: Tensor,
    ref_logp: Tensor | None,
    cu_targets: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    *,
    ref_per_token: bool,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """Losses [B] and metrics [2, B] (rewards, log-probs) of completions on their own."""
    sums = sums_of(logp, ref_logp, cu_targets, per_token=ref_per_token)
    side = Side(sums.logp, sums.ref_logp, sums.length, None if weight is None else weight.detach().double())
    metrics = torch.stack((beta * side.logratio.detach(), side.logp.detach()))
    return equation(side, labels).to(logp.dtype), metrics.to(logp.dtype)
