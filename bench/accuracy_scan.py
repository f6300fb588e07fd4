"""GAE and discounted returns; plain torch is the loop over time that trainers run."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.accuracy import At, Case, Values, accuracy
from fastalign.ops.scan import discounted_returns, gae


@accuracy("scan", dtypes=(torch.float32,))
def scans(at: At) -> Case:
    sequences, length = (3, 50) if at.quick else (8, 512)
    rewards, values = at.randn(sequences, length), at.randn(sequences, length)
    cu_seqlens = torch.arange(0, sequences * length + 1, length, dtype=torch.int32)

    def loop(reward: Tensor, value: Tensor) -> Values:
        advantage, total = torch.zeros_like(reward[:, 0]), torch.zeros_like(reward[:, 0])
        advantages, returns = [], []
        for t in reversed(range(length)):
            after = value[:, t + 1] if t < length - 1 else torch.zeros_like(advantage)
            advantage = reward[:, t] + 0.99 * after - value[:, t] + 0.99 * 0.95 * advantage
            total = reward[:, t] + 0.99 * total
            advantages.append(advantage)
            returns.append(total)
        return {name: torch.stack(found[::-1], 1).flatten() for name, found in (("gae", advantages), ("returns", returns))}

    def ours() -> Values:
        advantages, _ = gae(rewards.flatten(), values.flatten(), cu_seqlens, gamma=0.99, lam=0.95)
        return {"gae": advantages, "returns": discounted_returns(rewards.flatten(), cu_seqlens, gamma=0.99)}

    return Case(ours, loop(rewards, values), loop(rewards.double(), values.double()))
