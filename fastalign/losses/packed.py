"""Preference losses by name, from packed per-token log-probs: what recipes call, alone or inside `linear_loss`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastalign.ops.linear_loss import units_of
from fastalign.ops.preference import Sequences, pair_losses, single_losses
from fastalign.ops.preference_native import fits
from fastalign.ops.preference_reference import Side, sums_of

from .checks import check_read, count, expect, pair_plan, reference_form, single_plan
from .preference import PREFERENCE, Mixture, PairLoss
from .unpaired import UnpairedLoss

METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")


def preference_loss(
    logp: Tensor,
    cu_targets: Tensor,
    *,
    loss: str | PairLoss = "dpo",
    options: Mapping[str, Any] | None = None,
    ref_logp: Tensor | None = None,
    margin: Tensor | None = None,
    weight: Tensor | None = None,
    divergence: str = "reverse_kl",
    divergence_alpha: float = 0.5,
    ld_alpha: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Preference losses of pairs: sequences 2i (chosen) and 2i+1 (rejected), as `pack([pair(...), ...])` lays them out.

    Args:
        logp: [N] fp32 or fp64 log-probs (nats) of the scored tokens.
        cu_targets: [2B+1] offsets of the sequences, int32, on the CPU (on the GPU they are taken unchecked).
        loss: a row of `losses.preference.PREFERENCE` or its name.
        options: the row's own keyword arguments, what its `statistics` returned included; of rows that are `soft` label_smoothing may be
            [B], 1 minus the probability of each label. A tensor on a GPU costs a synchronization.
        ref_logp: the reference's log-probs: [N] a token, or sums [2B] or [B, 2]; None: a uniform reference.
        margin: [B] what β Δ must exceed (ODPO, arXiv:2402.10571), for rows that read one.
        weight: [B] multiplies the losses (WPO: `wpo_weights`).
        divergence: the f-divergence to the reference, a row of `losses.preference.DIVERGENCES`.
        divergence_alpha: alpha's alpha.
        ld_alpha: what a token past the length of the pair's shorter completion counts (LD-DPO, arXiv:2409.06411); 1: all alike.

    Returns:
        [B] losses in logp's dtype, differentiable in logp, and detached [B] metrics: rewards (β times the score that the loss compares,
        a token's mean where the loss has it so, before any divergence), their margin and accuracy, log-probs of both completions
        (summed with ld_alpha); for orpo also nll_loss and log_odds_ratio. Sums are taken in fp64. An empty completion has log-prob 0.

    Raises:
        ValueError: shapes or dtypes do not fit, an unknown name, an option out of range, a reference, margin or divergence for a row that
            has none.
        RuntimeError: on a second differentiation (native backend).
    """
    form = fits(logp, cu_targets, ref_logp, margin, weight, 2)
    ref, per_token = ref_logp, form == 2
    if not form:
        num_pairs = count("preference_loss", logp, cu_targets, 2)
        ref, per_token = reference_form("preference_loss", ref_logp, logp.shape[0], cu_targets, 2)
        for name, given in (("margin", margin), ("weight", weight)):
            expect("preference_loss", name, given, num_pairs)
    sequences = Sequences(cu_targets, ref, per_token, weight, margin, float(ld_alpha), bool(form))
    return _paired(logp, sequences, loss, options, divergence, divergence_alpha)


def _paired(
    logp: Tensor, sequences: Sequences, loss: str | PairLoss, options: Mapping[str, Any] | None, divergence: str, divergence_alpha: float
) -> tuple[Tensor, dict[str, Tensor]]:
    row, formula, equation = pair_plan(loss, options, divergence, divergence_alpha)
    check_read(loss, row, sequences)
    losses, numbers = pair_losses(logp, sequences, formula, equation)
    metrics = dict(zip(METRICS, numbers.unbind(), strict=True))
    if row.metrics is not None:
        lengths = sequences.cu_targets.to(logp.device).diff()
        metrics |= row.metrics(*(Side(metrics[f"logps/{name}"], None, lengths[i::2]) for i, name in enumerate(("chosen", "rejected"))))
    return losses, metrics


def unpaired_loss(
    logp: Tensor,
    cu_targets: Tensor,
    labels: Tensor,
    *,
    loss: str | UnpairedLoss = "kto",
    options: Mapping[str, Any] | None = None,
    ref_logp: Tensor | None = None,
    weight: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Preference losses of completions on their own.

    Args:
        logp: [N] fp32 or fp64 log-probs (nats) of the scored tokens.
        cu_targets: [B+1] offsets of the completions, int32, on the CPU (on the GPU they are taken unchecked).
        labels: [B] bool, True for a desirable completion.
        loss: a row of `losses.unpaired.UNPAIRED` or its name.
        options: the row's own keyword arguments, what its `statistics` returned included. A tensor on a GPU costs a synchronization.
        ref_logp: the reference's log-probs: [N] a token, or sums [B] or [B, 1]; None: a uniform reference.
        weight: [B] multiplies the losses.

    Returns:
        [B] losses in logp's dtype, differentiable in logp, and detached [B] metrics: rewards (β log-ratio) and logps; split them by
        labels for TRL's rewards/chosen and rewards/rejected.

    Raises:
        ValueError: shapes or dtypes do not fit, an unknown name, an option out of range.
        RuntimeError: on a second differentiation (native backend).
    """
    form = fits(logp, cu_targets, ref_logp, None, weight, 1)
    num = cu_targets.shape[0] - 1 if form else count("unpaired_loss", logp, cu_targets, 1)
    _, formula, equation = single_plan(loss, options)
    ref, per_token = (ref_logp, form == 2) if form else reference_form("unpaired_loss", ref_logp, logp.shape[0], cu_targets, 1)
    if labels.dtype != torch.bool:
        raise ValueError(f"unpaired_loss: labels must be bool [{num}], got {labels.dtype} {list(labels.shape)}")
    for name, given in (("labels", labels), ("weight", weight)):
        expect("unpaired_loss", name, given, num)
    sequences = Sequences(cu_targets, ref, per_token, weight, fits=bool(form))
    losses, numbers = single_losses(logp, sequences, labels.to(logp.device), formula, equation)
    rewards, logps = numbers.unbind()
    return losses, {"rewards": rewards, "logps": logps}


def preference_objective(
    cu_targets: Tensor,
    *,
    num_pairs: int,
    loss: str | PairLoss = "dpo",
    options: Mapping[str, Any] | None = None,
    ref_logp: Tensor | None = None,
    margin: Tensor | None = None,
    weight: Tensor | None = None,
    divergence: str = "reverse_kl",
    divergence_alpha: float = 0.5,
    ld_alpha: float = 1.0,
) -> tuple[Callable[[Tensor, slice], tuple[Tensor, dict[str, Tensor]]], Tensor]:
    """(objective, units) for `linear_loss`: the mean preference loss, pairs being its units.

    Args:
        cu_targets: [2B+1] of this micro-batch, on the CPU.
        num_pairs: pairs of the whole batch, over all micro-batches and processes: the divisor.
        options: of the row; its tensors [B] are taken to be one number a pair.
        loss, ref_logp, margin, weight, divergence, divergence_alpha, ld_alpha: as `preference_loss` takes them.

    Returns:
        The objective, which returns its share of the mean and the sums of the metrics, and its units: the offsets of the pairs [B+1], or
        of the micro-batch [2] where a loss ranks its pairs and is not given the ranks of the batch (aot without `matched`).
    """
    units = cu_targets[::2].contiguous()
    row = PREFERENCE.get(loss) if isinstance(loss, str) else loss
    together = row is not None and row.couples_pairs and any((options or {}).get(k) is None for k, v in row.options.items() if v is None)
    num_here = len(units) - 1
    everything = slice(0, int(units[-1]))
    ref, per_token = reference_form("preference_objective", ref_logp, everything.stop, cu_targets, 2)

    def objective(logp: Tensor, span: slice) -> tuple[Tensor, dict[str, Tensor]]:
        # traced, linear_loss has one span; offsets could not be read
        pairs = slice(0, num_here) if torch.compiler.is_compiling() and span == everything else units_of(span, units)
        here = cu_targets[2 * pairs.start : 2 * pairs.stop + 1] - span.start
        chosen = {k: v[pairs] if isinstance(v, Tensor) and v.shape == (num_here,) else v for k, v in (options or {}).items()}
        cut = None if ref is None else ref[span] if per_token else ref[2 * pairs.start : 2 * pairs.stop]
        weights, margins = (None if t is None else t[pairs] for t in (weight, margin))
        sequences = Sequences(here, cut, per_token, weights, margins, float(ld_alpha))
        losses, metrics = _paired(logp, sequences, loss, chosen, divergence, divergence_alpha)
        return losses.sum() / num_pairs, {name: value.sum() for name, value in metrics.items()}

    return objective, units[[0, -1]] if together or (isinstance(row, Mixture) and row.couples_pairs) else units


def wpo_weights(logp: Tensor, cu_targets: Tensor, log_sum_sq: Tensor | None = None) -> Tensor:
    """WPO's weight of each pair (arXiv:2406.11827, Eq. 2), detached: how likely both completions are under the policy.

    Args:
        logp: [N] log-probs of the tokens.
        cu_targets: [2B+1].
        log_sum_sq: [N] log Σ_v p(v)² of each token's distribution, which aligns the weights over positions; None: not aligned.

    Returns:
        [B] product over both completions of exp(mean over tokens of logp - log_sum_sq); aligned, it may exceed 1.
    """
    values = logp.detach() if log_sum_sq is None else logp.detach() - log_sum_sq
    sums = sums_of(values, None, cu_targets.to(logp.device), per_token=False)
    return sums.mean_logp.view(-1, 2).sum(1).exp().to(logp.dtype)
