"""Policy-gradient losses: equations over tokens, in torch. They are here and not in `losses` because the op runs them too.

Each takes `logp, old_logp, advantages` `[N]` fp32 or fp64 (nats) and `cu_targets` `[B+1]`, the sequences' offsets, and returns
`[N]` losses to minimize. Their kernels' form is csrc/math/policy.h. Compare gradients, not values: on-policy most of these losses
are minus the mean advantage.

Log-ratios saturate at ±MAX_LOG_RATIO, with gradient zero beyond, so that no exponential overflows: e^20 is 4.9e8, and 0 · inf is
NaN in every peer that does without. An advantage of zero is a loss and a gradient of exactly zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
LOWEST_LOGP = -1e4  # gspo_token: below it (minus infinity) a token has no gradient of its own


def saturated(log_ratio: Tensor) -> Tensor:
    """The log-ratio inside ±MAX_LOG_RATIO; no gradient outside."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def owners(cu_targets: Tensor, num_tokens: int, device: torch.device) -> Tensor:
    """The sequence of each token, [N] int64."""
    ends = cu_targets[1:].to(device).long()
    return torch.searchsorted(ends, torch.arange(num_tokens, device=device), right=True)


def sequence_sum(values: Tensor, cu_targets: Tensor) -> Tensor:
    """The sum of each token's sequence, [N]; added in fp64."""
    index = owners(cu_targets, len(values), values.device)
    total = torch.zeros(cu_targets.numel() - 1, dtype=torch.float64, device=values.device).index_add(0, index, values.double())
    return total[index].to(values.dtype)


def sequence_mean(values: Tensor, cu_targets: Tensor) -> Tensor:
    """The mean of each token's sequence, [N]; added in fp64."""
    lengths = cu_targets.diff().to(values.device)
    return sequence_sum(values, cu_targets) / lengths[owners(cu_targets, len(values), values.device)]


def _bounds(epsilon: float, epsilon_high: float | None) -> tuple[float, float]:
    return 1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high)


def _clipped(ratio: Tensor, advantages: Tensor, epsilon: float, epsilon_high: float | None) -> Tensor:
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(*_bounds(epsilon, epsilon_high)))


def _weighted_logp(weight: Tensor, logp: Tensor) -> Tensor:
    """-weight · log π; 0 where the weight is, whatever log π."""
    return torch.where(weight == 0, torch.zeros_like(logp), -weight * logp)


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
    loss = _clipped(saturated(logp - old_logp).exp(), advantages, epsilon, epsilon_high)
    if dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)


def reinforce(logp: Tensor, old_logp: Tensor, advantages: Tensor, cu_targets: Tensor) -> Tensor:
    """REINFORCE (Williams 1992): -A log π; `old_logp` is not used."""
    return _weighted_logp(advantages, logp)


def gspo(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    cu_targets: Tensor,
    *,
    epsilon: float = 3e-4,
    epsilon_high: float | None = 4e-4,
) -> Tensor:
    """GSPO (arXiv:2507.18071, Eq. 5–7): one ratio a sequence, exp of its mean log-ratio, clipped. Each token carries it.

    Where tokens are added up ("budget"), a sequence counts by its length: TRL's luspo, up to the constant.
    """
    ratio = saturated(sequence_mean(logp - old_logp, cu_targets)).exp()
    return _clipped(ratio, advantages, epsilon, epsilon_high)


def gspo_token(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    cu_targets: Tensor,
    *,
    epsilon: float = 3e-4,
    epsilon_high: float | None = 4e-4,
) -> Tensor:
    """GSPO-token (arXiv:2507.18071, §4.3): the sequence's ratio in value, each token's own log-prob in gradient, so that
    advantages may differ inside a sequence: sg(s) · π / sg(π), clipped."""
    ratio = saturated(sequence_mean(logp - old_logp, cu_targets)).exp().detach()
    own = logp.clamp(min=LOWEST_LOGP)
    return _clipped(ratio * (own - own.detach()).exp(), advantages, epsilon, epsilon_high)


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
    ratio = saturated(logp - old_logp).exp().detach()
    return _weighted_logp(ratio.clamp(*_bounds(epsilon, epsilon_high)) * advantages, logp)


def sapo(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    cu_targets: Tensor,
    *,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
) -> Tensor:
    """SAPO (arXiv:2511.20347): a soft gate instead of a clip, -A · 4/τ · σ(τ (ratio - 1)); its slope at ratio 1 is that of the ratio.
    τ is tau_positive where A > 0, else tau_negative: the higher, the sooner off-policy tokens fade."""
    ratio = saturated(logp - old_logp).exp()
    tau = torch.full_like(advantages, tau_negative).masked_fill(advantages > 0, tau_positive)
    return -advantages * torch.sigmoid(tau * (ratio - 1)) * (4 / tau)


def gmpo(logp: Tensor, old_logp: Tensor, advantages: Tensor, cu_targets: Tensor, *, epsilon: float = 0.4) -> Tensor:
    """GMPO (arXiv:2507.20673): the geometric mean of a sequence's ratios, each limited beforehand to e^±epsilon on the side that its
    advantage rewards. epsilon is in nats (the paper's (e^-0.4, e^0.4)); sums are taken of logarithms."""
    sign = torch.where(advantages < 0, -1.0, 1.0).to(logp.dtype)
    limited = sign * (sign * saturated(logp - old_logp)).clamp(max=epsilon)
    return -advantages * saturated(sequence_mean(limited, cu_targets)).exp()


def raft(logp: Tensor, old_logp: Tensor, advantages: Tensor, cu_targets: Tensor) -> Tensor:
    """RAFT (arXiv:2304.06767): maximum likelihood of the samples with a positive advantage, -1[A > 0] log π."""
    return _weighted_logp((advantages > 0).to(logp.dtype), logp)


def raft_pp(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    cu_targets: Tensor,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
) -> Tensor:
    """RAFT++ (arXiv:2504.11343): RAFT with PPO's clipped ratio in the place of the log-prob."""
    return _clipped(saturated(logp - old_logp).exp(), (advantages > 0).to(logp.dtype), epsilon, epsilon_high)


def self_imitation(logp: Tensor, old_logp: Tensor, advantages: Tensor, cu_targets: Tensor) -> Tensor:
    """Self-imitation (arXiv:1806.05635, Eq. 2): -max(A, 0) log π: only what went better than expected is repeated."""
    return _weighted_logp(advantages.clamp(min=0), logp)


def k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """KL(π ∥ ref) estimated as log π - log ref: unbiased, high variance (Schulman 2020)."""
    return logp - ref_logp


def k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """KL estimated as ½ (log π - log ref)²: its gradient is that of the KL in expectation (Schulman 2020)."""
    return 0.5 * (logp - ref_logp).square()


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """KL estimated as ref/π - 1 - log(ref/π) ≥ 0: unbiased, low variance (Schulman 2020; GRPO, arXiv:2402.03300, Eq. 4).

    TRL's GRPO weighs it by the policy's ratio unless use_bias_correction_kl is off; this is the published term.
    """
    log_ratio = (ref_logp - logp).clamp(max=MAX_LOG_RATIO)
    return torch.expm1(log_ratio) - log_ratio


@dataclass(frozen=True)
class Kernel:
    """How the kernels compute a row: which branch of csrc/math/policy.h, with which numbers.

    Attributes:
        kind: a name of `KINDS`.
        advantage: what is read for the advantage, a name of `ADVANTAGES`: "all" A, "positive" max(A, 0), "indicator" 1 where A > 0.
        low, high: where a ratio counts as clipped.
        dual_clip: 0: none.
        tau_positive, tau_negative: SAPO's temperatures.
        log_epsilon: GMPO's limit.
    """

    kind: str
    advantage: str = "all"
    low: float = -float("inf")
    high: float = float("inf")
    dual_clip: float = 0.0
    tau_positive: float = 1.0
    tau_negative: float = 1.0
    log_epsilon: float = 0.0


def _ranged(kind: str, advantage: str = "all") -> Callable[..., Kernel]:
    def build(*, epsilon: float, epsilon_high: float | None, dual_clip: float | None = None) -> Kernel:
        low, high = _bounds(epsilon, epsilon_high)
        return Kernel(kind, advantage, low, high, dual_clip or 0.0)

    return build


def _gmpo_kernel(*, epsilon: float) -> Kernel:
    return Kernel("gmpo", low=math.exp(-epsilon), high=math.exp(epsilon), log_epsilon=epsilon)


@dataclass(frozen=True)
class PolicyLoss:
    """A row.

    Attributes:
        function: the equation.
        unit: what one unit of it couples, "token" or "sequence".
        kernel: the row's keyword arguments → how kernels compute it; None: torch does.
        positive_only: a token whose advantage is not positive has neither loss nor gradient.
    """

    function: Callable[..., Tensor]
    unit: str = "token"
    kernel: Callable[..., Kernel] | None = None
    positive_only: bool = False


KINDS = ("reinforce", "clip", "cispo", "sapo", "gspo", "gspo_token", "gmpo")  # in the order of math::PolicyLoss
ADVANTAGES = ("all", "positive", "indicator")  # of math::Advantage
KL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}  # of math::Divergence, after none
CORRECTIONS = ("none", "truncate", "mask", "sequence_truncate", "sequence_mask")  # of math::Correction
POLICY: dict[str, PolicyLoss] = {
    "clip": PolicyLoss(clip, kernel=_ranged("clip")),
    "reinforce": PolicyLoss(reinforce, kernel=lambda: Kernel("reinforce")),
    "gspo": PolicyLoss(gspo, unit="sequence", kernel=_ranged("gspo")),
    "gspo_token": PolicyLoss(gspo_token, unit="sequence", kernel=_ranged("gspo_token")),
    "cispo": PolicyLoss(cispo, kernel=_ranged("cispo")),
    "sapo": PolicyLoss(sapo, kernel=lambda **tau: Kernel("sapo", **tau)),
    "gmpo": PolicyLoss(gmpo, unit="sequence", kernel=_gmpo_kernel),
    "raft": PolicyLoss(raft, kernel=lambda: Kernel("reinforce", "indicator"), positive_only=True),
    "raft_pp": PolicyLoss(raft_pp, kernel=_ranged("clip", "indicator"), positive_only=True),
    "self_imitation": PolicyLoss(self_imitation, kernel=lambda: Kernel("reinforce", "positive"), positive_only=True),
}
