"""GAE over packed sequences against the loop over time that TRL and verl run on a padded batch.

    python bench/bench_scan.py [--quick] [--rounds 5]

The floor is bytes: rewards and values read, advantages and returns written once (a copy of as many bytes).
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.harness import run_file
from fastalign.ops.scan import gae


@pytest.mark.parametrize("sequences, length", [(64, 2048), (1, 32768)])
def bench_gae(versus, device, quick, sequences, length):
    length //= 4 if quick else 1
    rewards, values = torch.randn(2, sequences, length, device=device)
    cu_seqlens = torch.arange(0, sequences * length + 1, length, dtype=torch.int32)
    flat_rewards, flat_values = rewards.reshape(-1), values.reshape(-1)
    from_, to = torch.empty(2, 2, sequences * length, device=device)

    def loop_over_time():
        last, found = torch.zeros(sequences, device=device), []
        for t in reversed(range(length)):
            next_value = values[:, t + 1] if t < length - 1 else 0.0
            last = rewards[:, t] + 0.99 * next_value - values[:, t] + 0.99 * 0.95 * last
            found.append(last)
        advantages = torch.stack(found[::-1], 1)
        return advantages, advantages + values

    sides = {
        "fastalign": lambda: gae(flat_rewards, flat_values, cu_seqlens, gamma=0.99, lam=0.95),
        "torch": loop_over_time,
        "floor": lambda: to.copy_(from_),
    }
    for op, cold in (("gae", True), ("gae, warm", False)):  # warm: in training the step before has just written its inputs
        versus(op, f"B={sequences} T={length}", torch.float32, sides, bytes=16.0 * sequences * length, memory=False, cold=cold)


if __name__ == "__main__":
    run_file(__file__)
