"""The specification: every linear op in plain torch, in fp32 (fp64 where the inputs are fp64), with the logits in memory.

Order of operations everywhere: logits = hidden · headᵀ + bias → soft-cap → ÷ temperature. The oracle of the tests, and
the way to second derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign.ops.divergence import Divergence, divergence_terms


def scaled_logits(logits: Tensor, temperature: float = 1.0, logit_softcap: float | None = None) -> Tensor:
    """logits [N, V] of any float dtype → soft-capped, divided by the temperature, fp32 (fp64 stays fp64)."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if logit_softcap is not None:
        wide = logit_softcap * torch.tanh(wide / logit_softcap)
    return wide if temperature == 1.0 else wide / temperature


def entropy_of(log_p: Tensor) -> Tensor:
    """Entropy in nats over the last dimension; a probability of zero adds nothing."""
    p = log_p.exp()
    return -torch.where(p > 0, p * log_p, torch.zeros((), dtype=p.dtype, device=p.device)).sum(-1)


def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
) -> Any:
    """What `fastalign.linear_logp` computes, through plain autograd."""
    z = scaled_logits(F.linear(hidden, weight, bias), temperature, logit_softcap)
    log_p = torch.log_softmax(z, -1)
    kept = targets != ignore_index
    logp = log_p.gather(1, torch.where(kept, targets, 0)[:, None]).squeeze(1)
    logp = torch.where(kept, logp, torch.zeros_like(logp))
    if not return_entropy:
        return logp
    entropy = entropy_of(log_p)
    return logp, torch.where(kept, entropy, torch.zeros_like(entropy))


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    objective: Callable[..., Any],
    *,
    units: Sequence[int] | Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    return_entropy: bool = False,
) -> Tensor:
    """The scalar of `fastalign.linear_loss`: the objective of every unit, one unit at a time, through plain autograd."""
    found = linear_logp(
        hidden, weight, targets, bias=bias, temperature=temperature, logit_softcap=logit_softcap, return_entropy=return_entropy
    )
    values = found if return_entropy else (found,)
    offsets = list(range(len(targets) + 1)) if units is None else [int(u) for u in units]
    total = hidden.sum() * 0
    for start, stop in pairwise(offsets):
        if stop > start:
            out = objective(*(v[start:stop] for v in values), slice(start, stop))
            total = total + (out[0] if isinstance(out, tuple) else out)
    return total


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """What `fastalign.linear_cross_entropy` computes, through plain autograd."""
    z = scaled_logits(F.linear(input, linear_weight, linear_bias))
    weight = None if weight is None else weight.to(z.dtype)
    loss = F.cross_entropy(z, target, weight, reduction="none", ignore_index=ignore_index, label_smoothing=label_smoothing)
    kept = target != ignore_index
    if z_loss:
        loss = loss + torch.where(kept, z_loss * torch.logsumexp(z, -1).square(), torch.zeros_like(loss))
    if reduction == "none":
        return loss
    if reduction == "sum" or not kept.any():
        return loss.sum()
    return loss.sum() / (kept.sum() if weight is None else weight[target[kept]].sum())


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    divergence: str = "forward_kl",
    jsd_beta: float = 0.5,
    temperature: float = 1.0,
    row_weight: Tensor | None = None,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
) -> Tensor:
    """What `fastalign.linear_kl` computes, through plain autograd."""
    s = torch.log_softmax(scaled_logits(F.linear(hidden, weight, bias), temperature), -1)
    with torch.no_grad():
        t = torch.log_softmax(scaled_logits(F.linear(teacher_hidden, teacher_weight, teacher_bias), temperature), -1)
    found = divergence_terms(s, t, Divergence.of("linear_kl", divergence, jsd_beta, temperature))[0]
    return found if row_weight is None else (found * row_weight).sum()
