"""AdamW steps against torch.optim.AdamW: fp32 weights, and bf16 weights with the tails of their fp32 masters.

    python bench/bench_adamw.py [--quick] [--rounds 5] [--clock wall|cpu] [--threads N]

The floor is bytes: a copy that reads and writes as many. For bf16 the peer is what keeps an fp32 master without a tail: a second, fp32
copy of the weights, stepped by torch's fused AdamW and cast to bf16 (30 bytes an element where ours moves 28, and 4 more to keep).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.harness import run_file
from fastalign.ops.adamw import adamw_step_, split_master

SHAPES = [(4096, 1024)] * 3 + [(1024, 1024)] * 4 + [(1024,)] * 2  # a transformer layer of 1024
OPTIONS = {"lr": 1e-5, "weight_decay": 0.01}


def bench_adamw(versus, device, quick, dtype):
    shapes = SHAPES * (1 if quick or device == "cpu" else 16)
    masters = [torch.randn(shape, device=device) for shape in shapes]
    grads = [torch.randn_like(master) for master in masters]
    ours = [split_master(master) if dtype == torch.bfloat16 else (master.clone(), None) for master in masters]
    moments = [(torch.zeros_like(master), torch.zeros_like(master)) for master in masters]
    factor = torch.ones(1, device=device)

    def step():
        for (weight, tail), grad, (exp_avg, exp_avg_sq) in zip(ours, grads, moments, strict=True):
            adamw_step_(weight, grad, exp_avg, exp_avg_sq, step=10, grad_scale=factor, tail=tail, **OPTIONS)

    cast = [master.bfloat16() for master in masters] if dtype == torch.bfloat16 else []

    def torch_step(**options):
        params = [master.clone().requires_grad_() for master in masters]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer = torch.optim.AdamW(params, **OPTIONS, **options)

        def run():
            optimizer.step()
            if cast:
                torch._foreach_copy_(cast, params)

        return torch.no_grad()(run)

    size = sum(master.numel() for master in masters)
    from_, to = torch.empty(2, 14 * size // 4, device=device)
    sides = {
        "fastalign": step,
        "torch": torch_step(fused=True),
        "torch foreach": torch_step(foreach=True),
        "floor": lambda: to.copy_(from_),
    }
    versus("adamw", f"{len(shapes)} tensors, {size / 1e6:.0f}M", dtype, sides, bytes=28.0 * size)


if __name__ == "__main__":
    run_file(__file__)
