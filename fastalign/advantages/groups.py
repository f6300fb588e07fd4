"""Advantages of groups: rewards in, one advantage a sequence out.

Every estimator takes rewards `[P, G]`, or flat `[B]` with `cu_groups` `[P+1]` where groups are ragged (filtered, aborted or
branched samples). A missing reward is NaN: it is skipped by every mean and its own advantage is 0; a group of one has
advantage 0 under every estimator with a group baseline. The result has the shape of `rewards`, fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Groups:
    """Flat rewards with missing ones zeroed, and what the estimators reduce over."""

    values: Tensor  # [B] fp32
    present: Tensor  # [B] fp32, 1 where the reward exists
    index: Tensor  # [B] the group of each sequence
    count: Tensor  # [P] rewards that exist

    def total(self, x: Tensor) -> Tensor:
        return x.new_zeros(self.count.numel()).index_add_(0, self.index, x)

    def mean(self) -> Tensor:
        """[B] the mean reward of each sequence's group."""
        return (self.total(self.values) / self.count.clamp(min=1))[self.index]

    def constant(self) -> Tensor:
        """[B] bool: all rewards of the group are equal, to the bit; means round, so differences must not be trusted to be 0."""
        inf = torch.full_like(self.count, torch.inf)
        masked = torch.where(self.present > 0, self.values, torch.nan)
        low = inf.scatter_reduce(0, self.index, masked.nan_to_num(torch.inf), "amin")
        high = (-inf).scatter_reduce(0, self.index, masked.nan_to_num(-torch.inf), "amax")
        return (low >= high)[self.index]

    def finish(self, advantages: Tensor, shape: torch.Size) -> Tensor:
        return torch.where(self.present > 0, advantages, 0.0).view(shape)


def _grouped(rewards: Tensor, cu_groups: Tensor | None) -> _Groups:
    flat = rewards.reshape(-1).float()
    if cu_groups is None:
        if rewards.dim() != 2:
            raise ValueError(
                f"advantages: expected rewards [P, G], or flat [B] with cu_groups; got shape {list(rewards.shape)} without cu_groups"
            )
        sizes = torch.full((rewards.shape[0],), rewards.shape[1], dtype=torch.long)
    else:
        sizes = cu_groups.long().diff().cpu()
        if int(sizes.sum()) != flat.numel() or int(cu_groups[0]) != 0:
            raise ValueError(f"advantages: cu_groups must run from 0 to {flat.numel()} rewards, got {cu_groups.tolist()}")
    if torch.isinf(flat).any():
        raise ValueError("advantages: rewards must be finite or NaN (missing), got inf; bound the reward function")
    index = torch.repeat_interleave(torch.arange(sizes.numel()), sizes).to(flat.device)
    present = (~torch.isnan(flat)).float()
    count = present.new_zeros(sizes.numel()).index_add_(0, index, present)
    return _Groups(flat.nan_to_num(0.0), present, index, count)


def grpo(rewards: Tensor, cu_groups: Tensor | None = None, *, eps: float = 1e-4) -> Tensor:
    """GRPO (arXiv:2402.03300, §4.1.2): (r - mean) / (std + eps) over the group, std with Bessel's correction. Constant group: 0."""
    g = _grouped(rewards, cu_groups)
    centred = (g.values - g.mean()) * g.present
    variance = g.total(centred.square()) / (g.count - 1).clamp(min=1)
    advantages = centred / (variance.sqrt()[g.index] + eps)
    return g.finish(torch.where(g.constant(), 0.0, advantages), rewards.shape)


def dr_grpo(rewards: Tensor, cu_groups: Tensor | None = None) -> Tensor:
    """Dr.GRPO (arXiv:2503.20783): r - mean over the group, no division by the deviation."""
    g = _grouped(rewards, cu_groups)
    return g.finish(torch.where(g.constant(), 0.0, g.values - g.mean()), rewards.shape)


def rloo(rewards: Tensor, cu_groups: Tensor | None = None) -> Tensor:
    """RLOO (arXiv:2402.14740, Eq. 8): r minus the mean of the group's *other* rewards."""
    g = _grouped(rewards, cu_groups)
    scale = (g.count / (g.count - 1).clamp(min=1))[g.index]
    return g.finish(torch.where(g.constant(), 0.0, scale * (g.values - g.mean())), rewards.shape)


def reinforce_pp(rewards: Tensor, cu_groups: Tensor | None = None, *, eps: float = 1e-8) -> Tensor:
    """REINFORCE++ (arXiv:2501.03262): rewards normalized over the global batch, no group baseline."""
    g = _grouped(rewards, cu_groups)
    return g.finish(_whiten(g.values, g.present, eps), rewards.shape)


def reinforce_pp_baseline(rewards: Tensor, cu_groups: Tensor | None = None, *, eps: float = 1e-8) -> Tensor:
    """REINFORCE++-baseline (arXiv:2501.03262, §3): group mean subtracted, then normalized over the global batch."""
    g = _grouped(rewards, cu_groups)
    centred = torch.where(g.constant(), 0.0, g.values - g.mean())
    return g.finish(_whiten(centred, g.present, eps), rewards.shape)


def lite_ppo(rewards: Tensor, cu_groups: Tensor | None = None, *, eps: float = 1e-4) -> Tensor:
    """Lite PPO (arXiv:2508.08221): (r - group mean) / (std + eps), std that of all rewards of the batch, with Bessel's correction.

    TRL's scale_rewards="batch". `reinforce_pp_baseline` divides by the deviation of what is left of the rewards without their group's
    mean, which is smaller where groups differ.
    """
    g = _grouped(rewards, cu_groups)
    count = g.present.sum()
    mean = g.values.sum() / count.clamp(min=1)
    variance = ((g.values - mean) * g.present).square().sum() / (count - 1).clamp(min=1)
    return g.finish(torch.where(g.constant(), 0.0, (g.values - g.mean()) / (variance.sqrt() + eps)), rewards.shape)


def reinforce(rewards: Tensor, cu_groups: Tensor | None = None) -> Tensor:
    """REINFORCE (Williams 1992): the reward itself, no baseline."""
    g = _grouped(rewards, cu_groups)
    return g.finish(g.values, rewards.shape)


def opo(rewards: Tensor, cu_groups: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
    """OPO (arXiv:2505.23585): r - Σ l r / Σ l over the group, the baseline of least variance where each token's score is alike.

    Args:
        lengths: [B] tokens of each sequence; None: all alike, and the baseline is the mean.
    """
    g = _grouped(rewards, cu_groups)
    weights = g.present if lengths is None else lengths.reshape(-1).to(g.values).clamp(min=0) * g.present
    baseline = (g.total(g.values * weights) / g.total(weights).clamp(min=torch.finfo(torch.float32).tiny))[g.index]
    return g.finish(torch.where(g.constant(), 0.0, g.values - baseline), rewards.shape)


def remax(rewards: Tensor, cu_groups: Tensor | None = None, greedy: Tensor | None = None) -> Tensor:
    """ReMax (arXiv:2310.10505): r minus the reward of the prompt's greedy completion.

    Args:
        greedy: [P] that reward; NaN (missing): the group has no advantage. None: a baseline of 0, as for REINFORCE.
    """
    g = _grouped(rewards, cu_groups)
    if greedy is None:
        return g.finish(g.values, rewards.shape)
    if greedy.numel() != g.count.numel():
        raise ValueError(f"remax: expected one greedy reward a group, {g.count.numel()}, got {greedy.numel()}")
    return g.finish((g.values - greedy.to(g.values)[g.index]).nan_to_num(0.0), rewards.shape)


def maxrl(rewards: Tensor, cu_groups: Tensor | None = None) -> Tensor:
    """MaxRL (arXiv:2602.02710): (r - mean) / mean over the group, for rewards ≥ 0 that say how right a sample is.

    In expectation the gradient of -Σ_{k < G} (1 - p)^k / k, which is log p(success) cut off at the group's size G; GRPO's is that of p,
    over the deviation. A group without a success has advantage 0.
    """
    g = _grouped(rewards, cu_groups)
    if bool((g.values < 0).any()):
        raise ValueError("maxrl: expected rewards >= 0 (0: wrong, 1: right), got a negative one; take grpo, or shift the reward")
    mean = g.mean()
    centred = torch.where(g.constant() | (mean <= 0), 0.0, g.values - mean)
    return g.finish(centred / mean.clamp(min=torch.finfo(torch.float32).tiny), rewards.shape)


def passk(rewards: Tensor, cu_groups: Tensor | None = None, *, k: int = 0, threshold: float = 0.5) -> Tensor:
    """Pass@k training (arXiv:2508.10751): each sample's mean advantage over all subsets of k samples of its group.

    A subset's reward is 1 where one of its samples is right, and is z-scored over all subsets. With W wrong of G samples,
    R = 1 - C(W, k) / C(G, k) and s = sqrt(R (1 - R)), a right sample has (1 - R) / s, a wrong one (1 - R - F) / s with
    F = C(W - 1, k - 1) / C(G - 1, k - 1).
    verl's grpo_passk is another method (arXiv:2503.19595), which moves the best sample alone.

    Args:
        k: samples of a subset, fewer than the group's; 0: half the group's.
        threshold: a reward over this is right.
    """
    if k < 0:
        raise ValueError(f"passk: k must be >= 0, got {k}")
    g = _grouped(rewards, cu_groups)
    right = g.present * (g.values > threshold)
    table = [_pass_at_k(int(count), int(number), k) for count, number in zip(g.count.tolist(), g.total(right).tolist(), strict=True)]
    both = g.values.new_tensor(table).view(-1, 2)[g.index]
    return g.finish(torch.where(right > 0, both[:, 0], both[:, 1]), rewards.shape)


def _pass_at_k(count: int, number: int, k: int) -> tuple[float, float]:
    """The advantages of a right and of a wrong sample, of `number` right ones in `count`."""
    wrong, k = count - number, min(k or max(1, count // 2), count)
    if number == 0 or wrong < k:  # every subset has the same reward
        return 0.0, 0.0
    passed = 1 - math.comb(wrong, k) / math.comb(count, k)
    deviation = math.sqrt(passed * (1 - passed))
    fails = math.comb(wrong - 1, k - 1) / math.comb(count - 1, k - 1)
    return (1 - passed) / deviation, (1 - passed - fails) / deviation


def _whiten(values: Tensor, present: Tensor, eps: float) -> Tensor:
    count = present.sum()
    mean = (values * present).sum() / count.clamp(min=1)
    variance = ((values - mean).square() * present).sum() / (count - 1).clamp(min=1)
    found = values[present > 0]
    if not found.numel() or bool(found.min() == found.max()):  # rounding of the mean must not become an advantage
        return torch.zeros_like(values)
    return (values - mean) / (variance.sqrt() + eps)


ADVANTAGES: dict[str, Callable[..., Tensor]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce": reinforce,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
    "lite_ppo": lite_ppo,
    "opo": opo,
    "remax": remax,
    "maxrl": maxrl,
    "passk": passk,
}
READS: dict[str, str] = {"opo": "lengths", "remax": "greedy"}  # what a row is given beside the rewards, an argument of its own
OF_SCALE = frozenset({"remax", "maxrl"})  # rows that compare rewards beyond their group or divide by them: not for relative rewards
