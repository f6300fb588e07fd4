"""policy_loss, forward + backward, against the same equations in eager torch.

    python bench/bench_policy.py [--quick] [--rounds 5] [--clock cpu --threads 1]

The floor is bytes: every input of the case read once, the gradient written once (a copy of as many bytes).
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.harness import run_file
from fastalign.ops.backend import use_backend
from fastalign.ops.policy import PolicyOptions, policy_loss

CASES = {  # loss, options, the optional inputs it reads
    "clip": ("clip", PolicyOptions(), ()),
    "clip + k3 + entropy": ("clip", PolicyOptions("k3", 0.04, 0.01), ("ref_logp", "entropy")),
    "clip + k3 + TIS": ("clip", PolicyOptions("k3", 0.04, correction="truncate"), ("ref_logp", "sampler_logp")),
    "gspo": ("gspo", PolicyOptions(), ()),
    "gmpo + sequence mask": ("gmpo", PolicyOptions(correction="sequence_mask"), ("sampler_logp",)),
}


SHAPES = [(16, 64), (64, 512), (256, 2048)]


@pytest.mark.parametrize("sequences, length", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def bench_policy(versus, device, quick, case, sequences, length):
    if quick and length > 512:
        pytest.skip("--quick")
    n, (loss, options, optional) = sequences * length, CASES[case]
    inputs = {"old_logp": -3 * torch.rand(n), "advantages": torch.randn(n), "weights": torch.full((n,), 1 / n), "entropy": torch.rand(n)}
    inputs |= {name: inputs["old_logp"] + 0.1 * torch.randn(n) for name in ("ref_logp", "sampler_logp")}
    given = {name: inputs[name].to(device) for name in ("old_logp", "advantages", "weights", *optional)}
    logp = (given["old_logp"] + 0.1 * torch.randn(n, device=device)).requires_grad_()
    cu_targets = torch.arange(0, n + 1, length, dtype=torch.int32)
    arrays = len(given) + 2  # logp and its gradient
    source, target = torch.empty(2, n * arrays // 2, device=device)

    def step():
        logp.grad = None
        policy_loss(logp, **given, loss=loss, cu_targets=cu_targets, options=options)[0].backward()

    def eager():
        with use_backend("reference"):
            step()

    sides = {"fastalign": step, "torch": eager, "floor": lambda: target.copy_(source)}
    versus(f"policy {case}", f"B={sequences} T={length}", torch.float32, sides, bytes=4.0 * n * arrays, memory=False)


if __name__ == "__main__":
    run_file(__file__)
