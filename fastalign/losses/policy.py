"""Policy-gradient losses: equations over tokens.

Each takes `logp, old_logp, advantages` `[N]` fp32 (nats) and `cu_targets` `[B+1]`, the sequences' offsets, and returns `[N]`
losses to minimize. Aggregation over tokens is separate (`token_weights`), so is the KL to the reference (`KL`).
Compare gradients, not values: on-policy every one of these losses is minus the mean advantage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def clip(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    cu_targets: Tensor,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    """PPO's clipped surrogate (arXiv:1707.06347, Eq. 7), with clip-higher (DAPO, arXiv:2503.14476, Eq. 10) and dual clip
    (arXiv:1912.09729, Eq. 5: a negative advantage loses at most dual_clip times itself)."""
    ratio = (logp - old_logp).exp()
    bounded = ratio.clamp(1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))
    loss = torch.maximum(-advantages * ratio, -advantages * bounded)
    if dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)


def reinforce(logp: Tensor, old_logp: Tensor, advantages: Tensor, cu_targets: Tensor) -> Tensor:
    """REINFORCE (Williams 1992): -A log π; `old_logp` is not used."""
    return -advantages * logp


def gspo(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    cu_targets: Tensor,
    *,
    epsilon: float = 3e-4,
    epsilon_high: float | None = 4e-4,
) -> Tensor:
    """GSPO (arXiv:2507.18071, Eq. 5–7): one ratio a sequence, exp of its mean log-ratio, clipped. Each token carries it."""
    lengths = cu_targets.diff().long()
    index = torch.repeat_interleave(torch.arange(lengths.numel(), device=logp.device), lengths.to(logp.device))
    total = logp.new_zeros(lengths.numel()).index_add(0, index, logp - old_logp)
    ratio = (total / lengths.to(logp.device).clamp(min=1)).exp()[index]
    bounded = ratio.clamp(1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))
    return torch.maximum(-advantages * ratio, -advantages * bounded)


def cispo(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    cu_targets: Tensor,
    *,
    epsilon: float = 1.0,
    epsilon_high: float | None = 4.0,
) -> Tensor:
    """CISPO (arXiv:2506.13585, Eq. 4): REINFORCE weighted by the clipped, detached ratio, so no token's gradient is lost.

    The clip is the paper's, ratio in [1 - epsilon, 1 + epsilon_high]; peers that read epsilon_high as the bound itself differ.
    """
    ratio = (logp - old_logp).exp().detach()
    return -ratio.clamp(1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high)) * advantages * logp


def k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """KL(π ∥ ref) estimated as log π - log ref: unbiased, high variance (Schulman 2020)."""
    return logp - ref_logp


def k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """KL estimated as ½ (log π - log ref)²: its gradient is that of the KL in expectation (Schulman 2020)."""
    return 0.5 * (logp - ref_logp).square()


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """KL estimated as ref/π - 1 - log(ref/π) ≥ 0: unbiased, low variance (Schulman 2020; GRPO, arXiv:2402.03300, Eq. 4)."""
    log_ratio = ref_logp - logp
    return torch.expm1(log_ratio) - log_ratio


def token_weights(aggregate: str, lengths: Tensor, *, num_tokens: int, num_sequences: int, budget: int) -> Tensor:
    """The weight of every token in the scalar loss, [N] fp32, for sequences of the given lengths [B].

    The divisors are those of the *whole* batch, so the loss does not depend on how it is cut into micro-batches.

    Args:
        aggregate: "token" (DAPO: every token counts the same), "sequence" (GRPO: every sequence counts the same) or
            "budget" (Dr.GRPO: every token counts 1 / budget, whatever the length).
        lengths: scored tokens of this micro-batch's sequences.
        num_tokens: scored tokens of the whole batch.
        num_sequences: sequences of the whole batch.
        budget: tokens a completion may have.
    """
    lengths = lengths.long()
    if aggregate == "sequence":
        per_sequence = 1.0 / (num_sequences * lengths.clamp(min=1).float())
    elif aggregate == "token":
        per_sequence = torch.full(lengths.shape, 1.0 / max(num_tokens, 1))
    elif aggregate == "budget":
        per_sequence = torch.full(lengths.shape, 1.0 / (num_sequences * budget))
    else:
        raise ValueError(f"aggregate: expected one of {', '.join(AGGREGATES)}; got {aggregate!r}")
    return torch.repeat_interleave(per_sequence, lengths)


@dataclass(frozen=True)
class PolicyLoss:
    """A row: the equation and what one unit of it couples ("token" or "sequence")."""

    function: Callable[..., Tensor]
    unit: str = "token"


AGGREGATES = ("token", "sequence", "budget")
KL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
POLICY: dict[str, PolicyLoss] = {
    "clip": PolicyLoss(clip),
    "reinforce": PolicyLoss(reinforce),
    "gspo": PolicyLoss(gspo, unit="sequence"),
    "cispo": PolicyLoss(cispo),
}
