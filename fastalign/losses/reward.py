"""Reward-model losses: equations of scores, flat over completions or steps, with the offsets of the rankings that own them.

Every function returns one loss a unit (a ranking, a completion, a step); the recipe divides by the units of the whole batch, so the
result does not depend on the cut into micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .scores import defaults, softplus


def pairs_of(cu_groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All C(K, 2) pairs of each ranking of K, best first: index of the better, of the worse, and of the ranking, [M] int64 each."""
    better, worse, owner = [], [], []
    bounds = cu_groups.tolist()
    for p, (begin, end) in enumerate(pairwise(bounds)):
        i, j = torch.triu_indices(end - begin, end - begin, 1).unbind()
        better.append(begin + i)
        worse.append(begin + j)
        owner.append(torch.full_like(i, p))
    if not owner:
        empty = torch.zeros(0, dtype=torch.int64)
        return empty, empty, empty
    return torch.cat(better), torch.cat(worse), torch.cat(owner)


def bradley_terry(
    scores: Tensor,
    cu_groups: Tensor,
    *,
    margin: Tensor | None = None,
    probability: Tensor | None = None,
    center_rewards_coefficient: float = 0.0,
) -> Tensor:
    """-log σ(r_w - r_l - m), the mean over all pairs of a ranking (InstructGPT, arXiv:2203.02155, Eq. 1; margin: arXiv:2307.09288, Eq. 2).

    Of soft labels it is -p log σ(r_w - r_l - m) - (1 - p) log σ(r_l - r_w - m), the cross-entropy to what AI feedback gives as the label's
    probability (arXiv:2212.08073, arXiv:2309.00267).

    A ranking's pairs are averaged within its unit, so a long ranking counts no more than a pair. Centring adds
    center_rewards_coefficient · (r_w + r_l)² (arXiv:2312.09244, Eq. 2), the mean over the same pairs.

    Args:
        scores: [B], each ranking's best first.
        cu_groups: [P+1] on the CPU; ranking p owns scores[cu_groups[p]:cu_groups[p+1]].
        margin: [P], how much better each better one is to be at least (the same for all pairs of a ranking); None: 0.
        probability: [P] in [0, 1], that the better one is the better one (the same for all pairs of a ranking); None: 1.

    Returns:
        [P] losses; 0 for a ranking of one.
    """
    better, worse, owner = (index.to(scores.device) for index in pairs_of(cu_groups))
    win, lose = scores[better], scores[worse]
    gap, least = win - lose, 0.0 if margin is None else margin.to(scores)[owner]
    loss = softplus(least - gap)
    if probability is not None:
        sure = probability.to(scores)[owner]
        loss = sure * loss + (1 - sure) * softplus(least + gap)
    if center_rewards_coefficient:
        loss = loss + center_rewards_coefficient * (win + lose).square()
    num_groups = cu_groups.numel() - 1
    counts = torch.bincount(owner, minlength=num_groups).clamp(min=1).to(loss.dtype)
    return scores.new_zeros(num_groups).index_add(0, owner, loss) / counts


def plackett_luce(scores: Tensor, cu_groups: Tensor) -> Tensor:
    """-log Π_i exp(r_i) / Σ_{j ≥ i} exp(r_j): the probability of the whole ranking (Plackett 1975; Luce 1959).

    Args:
        scores: [B], each ranking's best first.
        cu_groups: [P+1] on the CPU.

    Returns:
        [P] losses in nats; 0 for a ranking of one. Of two it is Bradley-Terry.
    """
    sizes = (cu_groups[1:] - cu_groups[:-1]).long()
    if not sizes.numel() or int(sizes.max()) == 0:
        return scores.new_zeros(sizes.numel())
    columns = torch.arange(int(sizes.max()))
    there = (columns < sizes[:, None]).to(scores.device)  # [P, K]
    index = (cu_groups[:-1, None].long() + columns).clamp(max=scores.numel() - 1).to(scores.device)
    ranked = scores[index].masked_fill(~there, 0.0)
    left = there[:, None, :] & (columns[None, :] >= columns[:, None]).to(scores.device)  # [P, i, j]: j is still to be placed at place i
    left = left | torch.eye(columns.numel(), dtype=torch.bool, device=scores.device)  # a place that is not there sees itself: no empty sum
    rest = ranked[:, None, :].expand(left.shape).masked_fill(~left, float("-inf")).logsumexp(-1)
    return ((rest - ranked) * there).sum(-1)


def binary_cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """-y log σ(r) - (1 - y) log σ(-r), [N] from scores [N] and labels [N] in [0, 1]."""
    return F.binary_cross_entropy_with_logits(scores, labels.to(scores), reduction="none")


def outcome(scores: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of whether each completion is right (outcome reward model, arXiv:2110.14168, section 4.2).

    Args:
        scores: [B] at the completions' ends; labels: [B] in [0, 1]. TRL has no such trainer. The paper reads a score at every token;
            here it is the last one's, as Lightman et al. (arXiv:2305.20050) use it.

    Returns:
        [B] losses.
    """
    return binary_cross_entropy(scores, labels)


def process(scores: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of whether each step is right, read at its end (process reward model, arXiv:2305.20050, section 2.5).

    Args:
        scores: [N] at the steps' ends; labels: [N] in [0, 1].

    Returns:
        [N] losses.
    """
    return binary_cross_entropy(scores, labels)


def attributes(scores: Tensor, labels: Tensor) -> Tensor:
    """Squared error of several scores of one completion: helpfulness, verbosity, … (HelpSteer2, arXiv:2406.08673, section 4.1).

    Args:
        scores: [B, K] at the completions' ends, one column an attribute; labels: [B, K], NaN where a record states none.

    Returns:
        [B] losses, the mean over the attributes that a record states; 0 where it states none.
    """
    stated = ~labels.isnan()
    errors = (scores - labels.to(scores).nan_to_num()).square() * stated.to(scores)
    return errors.sum(-1) / stated.sum(-1).clamp(min=1).to(scores)


def _segments(values: Tensor, cu_steps: Tensor) -> list[Tensor]:
    bounds = cu_steps.tolist()
    return [values[begin:end] for begin, end in pairwise(bounds)]


AGGREGATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "product": lambda steps: steps.prod(),
    "min": lambda steps: steps.min(),
    "last": lambda steps: steps[-1],
    "sum": lambda steps: steps.sum(),
}


def aggregate_steps(values: Tensor, cu_steps: Tensor, aggregation: str = "product") -> Tensor:
    """One number a solution from its steps' (arXiv:2305.20050, section 2.6: product and min; arXiv:2211.14275: last).

    Args:
        values: [N] of the steps, usually σ(score); cu_steps: [B+1] on the CPU.
        aggregation: sum, min, last or product.

    Returns:
        [B]; NaN for a solution without steps.

    Raises:
        ValueError: an unknown aggregation.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"step aggregation: expected one of {', '.join(AGGREGATIONS)}; got {aggregation!r}")
    reduce = AGGREGATIONS[aggregation]
    found = [reduce(steps) if steps.numel() else values.new_tensor(float("nan")) for steps in _segments(values, cu_steps)]
    return torch.stack(found) if found else values.new_zeros(0)


@dataclass(frozen=True)
class RewardLoss:
    """A row.

    Attributes:
        function: the equation. Rankings: (scores, cu_groups, **options); labels: (scores, labels, **options).
        reads: what the data are: "rankings" (pairs are rankings of two), "outcomes", "steps" or "attributes".
        options: its keyword options and what they are when not given.
    """

    function: Callable[..., Tensor]
    reads: str
    options: Mapping[str, Any] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", defaults(self.function))


REWARD: dict[str, RewardLoss] = {
    "bradley_terry": RewardLoss(bradley_terry, "rankings"),
    "plackett_luce": RewardLoss(plackett_luce, "rankings"),
    "outcome": RewardLoss(outcome, "outcomes"),
    "process": RewardLoss(process, "steps"),
    "attributes": RewardLoss(attributes, "attributes"),
}
