"""Advantages of tokens: rewards of tokens or steps in, one advantage a token or step out. All take packed sequences, fp32."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from ..ops.scan import discounted_returns, gae


def generalized(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    lam_critic: float | None = None,
    alpha: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """GAE (arXiv:1506.02438) of token rewards, with what VC-PPO and VAPO change in it.

    Args:
        rewards, values: [N] packed sequences, one reward and one value a token: the value of the state in which the token was chosen.
        cu_seqlens: [B+1] int32 offsets.
        gamma: discount a token.
        lam: lambda of the advantages.
        lam_critic: lambda of the returns that the critic learns (decoupled GAE, arXiv:2503.01491); None: lam.
        alpha: of a sequence of l tokens, lambda of the advantages is 1 - 1 / (alpha l), at least 0 (arXiv:2504.05118, Eq. 8); 0: lam.

    Returns:
        advantages [N] and returns [N].
    """
    lams: float | Tensor = lam
    if alpha:
        lams = (1 - 1 / (alpha * cu_seqlens.diff().clamp(min=1).double())).clamp(min=0.0)
    advantages, returns = gae(rewards, values, cu_seqlens, gamma=gamma, lam=lams)
    if alpha or lam_critic is not None:
        _, returns = gae(rewards, values, cu_seqlens, gamma=gamma, lam=lam if lam_critic is None else lam_critic)
    return advantages, returns


def process(rewards: Tensor, cu_steps: Tensor, cu_groups: Tensor, *, eps: float = 1e-4) -> Tensor:
    """Process-supervised GRPO (arXiv:2402.03300, section 4.1.3): each step's reward z-scored over all steps of its group, summed to go.

    A token's advantage is that of the step it belongs to: the sum of the normalized rewards of this step and of those behind it.

    Args:
        rewards: [M] of steps, packed by sequence; NaN: missing, it counts nowhere.
        cu_steps: [B+1] offsets of each sequence's steps.
        cu_groups: [P+1] offsets of each group's sequences.

    Returns:
        [M] fp32; 0 in a group whose rewards are all equal.
    """
    present = ~torch.isnan(rewards)
    normal = torch.zeros(rewards.shape, dtype=torch.float64)
    bounds = cu_steps[cu_groups.long()].tolist()
    for begin, end in itertools.pairwise(bounds):
        own = present[begin:end]
        values = rewards[begin:end][own].double()
        if len(values) > 1 and bool(values.min() < values.max()):
            normal[begin:end][own] = (values - values.mean()) / (values.std() + eps)
    return discounted_returns(normal.float(), cu_steps.int())


def prime(rewards: Tensor, cu_seqlens: Tensor, cu_groups: Tensor, *, gamma: float = 1.0) -> Tensor:
    """PRIME's advantage of implicit process rewards (arXiv:2502.01456, Eq. 5, its first term): leave-one-out, summed to go.

    The baseline of a sequence is the mean, over the group's *other* sequences, of their mean reward a token.

    Args:
        rewards: [N] β log(π_prm / π_ref) of every token, packed; cu_seqlens: [B+1] offsets; cu_groups: [P+1] of sequences.
        gamma: discount a token.

    Returns:
        [N] fp32; 0 in a group with fewer than two sequences that have tokens.
    """
    lengths = cu_seqlens.diff().long()
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    means = torch.zeros(len(lengths), dtype=torch.float64).index_add_(0, owner, rewards.double()) / lengths.clamp(min=1)
    filled = (lengths > 0).double()
    group = torch.repeat_interleave(torch.arange(len(cu_groups) - 1), cu_groups.diff().long())
    total, count = (torch.zeros(len(cu_groups) - 1, dtype=torch.float64).index_add_(0, group, x)[group] for x in (means, filled))
    others = (count - 1).clamp(min=1)
    centred = torch.where(count > 1, 1.0, 0.0)[owner] * (rewards.double() - ((total - means) / others)[owner])
    return discounted_returns(centred.float(), cu_seqlens.int(), gamma=gamma)


TOKEN_ADVANTAGES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"gae": generalized}  # rows of methods with a critic
DENSE_ADVANTAGES: dict[str, Callable[..., Tensor]] = {"process": process, "prime": prime}  # of methods with rewards on the way
