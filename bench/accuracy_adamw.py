"""AdamW: the master weights after ten steps; plain torch is torch.optim.AdamW on fp32 weights, with gradients in the case's dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.accuracy import At, Case, Values, accuracy
from fastalign.ops.adamw import adamw_step_, join_master, split_master

LR, BETAS, DECAY = 1e-3, (0.9, 0.95), 0.1


@accuracy("adamw")
def adamw_ten_steps(at: At) -> Case:
    start = torch.randn(1003 if at.quick else 100_003, device=at.device)
    grads = [at.randn(len(start)) for _ in range(10)]

    def plain(dtype: torch.dtype) -> Values:
        weight = torch.nn.Parameter(start.to(dtype, copy=True))
        optimizer = torch.optim.AdamW([weight], lr=LR, betas=BETAS, weight_decay=DECAY, foreach=False)
        for grad in grads:
            weight.grad = grad.to(dtype)
            optimizer.step()
        return {"master": weight.detach()}

    def ours() -> Values:
        weight, tail = split_master(start) if at.dtype == torch.bfloat16 else (start.clone(), None)
        moments: list[Tensor] = [torch.zeros_like(start), torch.zeros_like(start)]
        options = {"lr": LR, "beta1": BETAS[0], "beta2": BETAS[1], "weight_decay": DECAY}
        for step, grad in enumerate(grads, 1):
            adamw_step_(weight, grad, *moments, step=step, tail=tail, **options)
        return {"master": weight if tail is None else join_master(weight, tail)}

    return Case(ours, plain(torch.float32), plain(torch.float64))
