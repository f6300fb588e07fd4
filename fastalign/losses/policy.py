"""Policy-gradient losses: the tables of their equations, and the aggregation over tokens.

The equations are in `fastalign.ops.policy_equations`, one floor down, because `ops.policy_loss` runs them as well. Each takes
`logp, old_logp, advantages` `[N]` fp32 (nats) and `cu_targets` `[B+1]`, the sequences' offsets, and returns `[N]` losses to minimize.
Aggregation over tokens is separate (`token_weights`), so is the KL to the reference (`KL`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.policy_equations import (
    CORRECTIONS,
    KL,
    POLICY,
    PolicyLoss,
    cispo,
    clip,
    gmpo,
    gspo,
    gspo_token,
    k1,
    k2,
    k3,
    raft,
    raft_pp,
    reinforce,
    sapo,
    self_imitation,
)

__all__ = [
    "AGGREGATES",
    "CORRECTIONS",
    "KL",
    "POLICY",
    "PolicyLoss",
    "cispo",
    "clip",
    "gmpo",
    "gspo",
    "gspo_token",
    "k1",
    "k2",
    "k3",
    "raft",
    "raft_pp",
    "reinforce",
    "sapo",
    "self_imitation",
    "token_weights",
]

AGGREGATES = ("token", "sequence", "budget")


def token_weights(aggregate: str, lengths: Tensor, *, num_tokens: int, num_sequences: int, budget: int) -> Tensor:
    """The weight of every token in the scalar loss, [N] fp32, for sequences of the given lengths [B].

    The divisors are those of the *whole* batch, so the loss does not depend on how it is cut into micro-batches.

    Args:
        aggregate: "token" (DAPO: every token counts the same), "sequence" (GRPO: every sequence counts the same) or
            "budget" (Dr.GRPO: every token counts 1 / budget, whatever the length). TRL's bnpo is "token" of each micro-batch alone.
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
