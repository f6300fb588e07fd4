"""Preference losses by name, from packed per-token log-probs: what recipes call, alone or inside `linear_loss`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastalign import catalogue
from fastalign.ops.linear_loss import units_of
from fastalign.ops.preference import Formula, Sequences, pair_losses, single_losses
from fastalign.ops.preference_reference import Side, sums_of

from .divergences import DIVERGENCES
from .preference import PREFERENCE, PairLoss
from .unpaired import UNPAIRED, UnpairedLoss

METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")
POSITIVE = ("beta", "tau")  # options that divide, or whose sign is the loss's


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
        options: the row's own keyword arguments, what its `statistics` returned included. A tensor on a GPU costs a synchronization.
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
    num_pairs = _count("preference_loss", logp, cu_targets, 2)
    ref, per_token = _reference("preference_loss", ref_logp, logp.shape[0], cu_targets, 2)
    for name, given in (("margin", margin), ("weight", weight)):
        _expect("preference_loss", name, given, num_pairs)
    sequences = Sequences(cu_targets, ref, per_token, weight, margin, float(ld_alpha))
    return _paired(logp, sequences, loss, options, divergence, divergence_alpha)


def _paired(
    logp: Tensor, sequences: Sequences, loss: str | PairLoss, options: Mapping[str, Any] | None, divergence: str, divergence_alpha: float
) -> tuple[Tensor, dict[str, Tensor]]:
    row, chosen, formula = _resolve("preference_loss", PREFERENCE, loss, options)
    _check_row(loss, row, sequences, divergence)
    kind = DIVERGENCES[divergence]
    if kind.transform != "identity" and formula.name != "torch":
        power = kind.power(divergence_alpha)
        formula = replace(formula, transform=kind.transform if power or kind.transform == "js" else "identity", power=power)
    equation = functools.partial(row, divergence=divergence, divergence_alpha=divergence_alpha, **chosen)
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
    num = _count("unpaired_loss", logp, cu_targets, 1)
    row, chosen, formula = _resolve("unpaired_loss", UNPAIRED, loss, options)
    ref, per_token = _reference("unpaired_loss", ref_logp, logp.shape[0], cu_targets, 1)
    if labels.dtype != torch.bool:
        raise ValueError(f"unpaired_loss: labels must be bool [{num}], got {labels.dtype} {list(labels.shape)}")
    for name, given in (("labels", labels), ("weight", weight)):
        _expect("unpaired_loss", name, given, num)
    equation = functools.partial(row, **chosen)
    losses, numbers = single_losses(logp, Sequences(cu_targets, ref, per_token, weight), labels.to(logp.device), formula, equation)
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
        The objective, which returns its share of the mean and the sums of the metrics, and the offsets of the pairs [B+1].
    """
    units = cu_targets[::2].contiguous()
    num_here = len(units) - 1
    ref, per_token = _reference("preference_objective", ref_logp, int(units[-1]), cu_targets, 2)

    def objective(logp: Tensor, span: slice) -> tuple[Tensor, dict[str, Tensor]]:
        pairs = units_of(span, units)
        here = cu_targets[2 * pairs.start : 2 * pairs.stop + 1] - span.start
        chosen = {k: v[pairs] if isinstance(v, Tensor) and v.shape == (num_here,) else v for k, v in (options or {}).items()}
        cut = None if ref is None else ref[span] if per_token else ref[2 * pairs.start : 2 * pairs.stop]
        weights, margins = (None if t is None else t[pairs] for t in (weight, margin))
        sequences = Sequences(here, cut, per_token, weights, margins, float(ld_alpha))
        losses, metrics = _paired(logp, sequences, loss, chosen, divergence, divergence_alpha)
        return losses.sum() / num_pairs, {name: value.sum() for name, value in metrics.items()}

    return objective, units


def wpo_weights(logp: Tensor, cu_targets: Tensor, log_sum_sq: Tensor | None = None) -> Tensor:
    """WPO's weight of each pair (arXiv:2406.11827, Eq. 2), detached: how likely both completions are under the policy.

    Args:
        logp: [N] log-probs of the tokens.
        cu_targets: [2B+1].
        log_sum_sq: [N] log Σ_v p(v)² of each token's distribution, which aligns the weights over positions; None: not aligned.

    Returns:
        [B] product over both completions of exp(mean over tokens of logp - log_sum_sq).
    """
    values = logp.detach() if log_sum_sq is None else logp.detach() - log_sum_sq
    sums = sums_of(values, None, cu_targets.to(logp.device), per_token=False)
    return sums.mean_logp.view(-1, 2).sum(1).exp().to(logp.dtype)


def _count(op: str, logp: Tensor, cu_targets: Tensor, unit: int) -> int:
    """How many pairs or completions there are."""
    if logp.dim() != 1 or logp.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{op}: logp: expected float32 or float64 [N], got {logp.dtype} {list(logp.shape)}")
    if cu_targets.dim() != 1 or cu_targets.is_floating_point() or cu_targets.shape[0] % unit != 1 % unit or not cu_targets.shape[0]:
        what = "[2B+1]: two sequences a pair" if unit == 2 else "[B+1]"
        raise ValueError(f"{op}: cu_targets: expected integer offsets {what}, got {cu_targets.dtype} {list(cu_targets.shape)}")
    if cu_targets.device.type == "cpu" and not torch.compiler.is_compiling():
        offsets = cu_targets.tolist()
        if offsets[0] != 0 or offsets[-1] != logp.shape[0] or any(b < a for a, b in pairwise(offsets)):
            raise ValueError(f"{op}: cu_targets must rise from 0 to the {logp.shape[0]} log-probs, got {offsets[:16]}")
    return (cu_targets.shape[0] - 1) // unit


def _reference(op: str, ref_logp: Tensor | None, num_tokens: int, cu_targets: Tensor, unit: int) -> tuple[Tensor | None, bool]:
    """The reference's log-probs, and whether they are one a token; else they are sums [S]."""
    num = cu_targets.shape[0] - 1
    if ref_logp is None:
        return None, False
    if ref_logp.shape == (num // unit, unit):
        return ref_logp.reshape(-1), False
    if ref_logp.shape not in ((num_tokens,), (num,)):
        raise ValueError(f"{op}: ref_logp: expected [{num_tokens}] a token or sums [{num}], got {list(ref_logp.shape)}")
    if num == num_tokens and not torch.compiler.is_compiling() and bool((cu_targets.diff() != 1).any()):
        raise ValueError(f"{op}: ref_logp [{num}] could be tokens or sums; give sums as [{num // unit}, {unit}]")
    return ref_logp, ref_logp.shape[0] == num_tokens


def _expect(op: str, name: str, given: Tensor | None, num: int) -> None:
    if given is not None and given.shape != (num,):
        raise ValueError(f"{op}: {name}: expected [{num}], got {list(given.shape)}")


def _resolve(op: str, table: Mapping[str, Any], loss: Any, options: Mapping[str, Any] | None) -> tuple[Any, dict[str, Any], Formula]:
    """The row, all of its options, and the formula that the kernels evaluate."""
    if isinstance(loss, str) and loss not in table:
        raise ValueError(f"{op}: loss: {catalogue.nearest(loss, table)}")
    row = table[loss] if isinstance(loss, str) else loss
    chosen = {**row.options, **(options or {})}
    for name, value in chosen.items():
        if name not in row.options:
            raise ValueError(f"{op}: options of {loss}: {catalogue.nearest(name, row.options)}")
        if name in POSITIVE and not value > 0:
            raise ValueError(f"{op}: {name} must be > 0, got {value}")
        if name == "label_smoothing" and not 0 <= value < 1:
            raise ValueError(f"{op}: label_smoothing must be in [0, 1), got {value}")
    if torch.compiler.is_compiling() and any(isinstance(value, Tensor) for value in chosen.values()):
        return row, chosen, Formula(beta=chosen.get("beta", 1.0))  # its number cannot be read while tracing
    return row, chosen, row.formula(**chosen)


def _check_row(loss: str | PairLoss, row: PairLoss, sequences: Sequences, divergence: str) -> None:
    """Nothing that is given may be ignored."""
    if divergence not in DIVERGENCES:
        raise ValueError(f"preference_loss: divergence: {catalogue.nearest(divergence, DIVERGENCES)}")
    ref = sequences.ref_logp
    if sequences.tail != 1.0 and ref is not None and not sequences.ref_per_token:
        raise ValueError("preference_loss: ld_alpha weighs tokens; give ref_logp a token [N], not sums")
    unread = [
        name
        for name, given, read in (
            ("ref_logp", ref is not None, row.reference),
            ("margin", sequences.margin is not None, row.margin),
            (f"the divergence {divergence}", divergence != "reverse_kl", row.divergence),
        )
        if given and not read
    ]
    if unread:
        raise ValueError(f"preference_loss: {loss} does not read {' nor '.join(unread)}; leave it out")
