"""The specification of the `policy` op: loss and metrics of per-token log-probs in plain torch, differentiable by autograd."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .policy_equations import KL, Kernel, PolicyLoss, saturated, sequence_mean, sequence_sum


class PolicyInputs(NamedTuple):
    """What the op reads, [N] each but `cu_targets` [B+1]; None: not given."""

    logp: Tensor
    old_logp: Tensor
    advantages: Tensor
    weights: Tensor
    ref_logp: Tensor | None
    sampler_logp: Tensor | None
    entropy: Tensor | None
    cu_targets: Tensor


def policy_reference(
    inputs: PolicyInputs, row: PolicyLoss, loss_options: Mapping[str, Any], kernel: Kernel | None, terms: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """(scalar, {name: detached sum}): Σ weight (correction · loss + kl_coef · KL - entropy_coef · entropy), 0 where a weight is.

    Args:
        kernel: the clip range that is counted; None: nothing is counted as clipped.
        terms: the op's `PolicyOptions`.
    """
    logp, old_logp, advantages, weights, ref_logp, sampler_logp, entropy, cu_targets = inputs
    loss = row.function(logp, old_logp, advantages, cu_targets, **loss_options)
    sums = _clip_sums(inputs, row, kernel)
    if sampler_logp is not None and terms.correction != "none":
        correction, clipped = _correction(inputs, terms)
        loss = torch.where(correction == 0, torch.zeros_like(loss), correction * loss)
        sums |= {"correction": _total(correction), "correction_clipped": _total(clipped)}
    if ref_logp is not None:
        kl = KL[terms.kl](logp, ref_logp)
        sums["kl"] = _total(kl.detach())
        if terms.kl_coef:
            loss = loss + terms.kl_coef * kl
    if entropy is not None:
        sums["entropy"] = _total(entropy.detach())
        if terms.entropy_coef:
            loss = loss - terms.entropy_coef * entropy
    share = torch.where(weights == 0, torch.zeros_like(loss), weights * loss)
    return _total(share).to(logp.dtype), sums


def _total(values: Tensor) -> Tensor:
    return values.sum(dtype=torch.float64)


@torch.no_grad()
def _clip_sums(inputs: PolicyInputs, row: PolicyLoss, kernel: Kernel | None) -> dict[str, Tensor]:
    advantages, own = inputs.advantages, inputs.logp - inputs.old_logp
    near, by_sequence = saturated(own), kernel is not None and kernel.kind in ("gspo", "gspo_token")
    ratio = (saturated(sequence_mean(own, inputs.cu_targets)) if by_sequence else near).exp()
    low, high = (-float("inf"), float("inf")) if kernel is None else (kernel.low, kernel.high)
    losing = torch.zeros_like(advantages, dtype=torch.bool) if row.positive_only else advantages < 0
    return {
        "clip_low": _total((ratio < low) & losing),
        "clip_high": _total((ratio > high) & (advantages > 0)),
        "ratio": _total(ratio),
        "approx_kl": _total(0.5 * near.square()),
    }


@torch.no_grad()
def _correction(inputs: PolicyInputs, terms: Any) -> tuple[Tensor, Tensor]:
    """The detached weight of each off-policy token, and where its ratio was out of range."""
    assert inputs.sampler_logp is not None
    gap = inputs.old_logp - inputs.sampler_logp
    if terms.correction.startswith("sequence"):
        gap = sequence_sum(gap, inputs.cu_targets)
    ratio = saturated(gap).exp()
    if terms.correction.endswith("truncate"):
        return ratio.clamp(max=terms.correction_high), ratio > terms.correction_high
    outside = (ratio < terms.correction_low) | (ratio > terms.correction_high)
    return torch.where(outside, torch.zeros_like(ratio), ratio), outside
