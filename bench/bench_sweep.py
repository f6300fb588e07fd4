"""Time and peak memory against the scored tokens T and the vocabulary V: what stays flat, and what torch pays.

    python bench/bench_sweep.py [--quick]

Memory is what a forward and backward allocates beyond its inputs and the gradients it returns. A narrow head (H = 64), so that
the logits dominate everything else. torch is left out where its logits would take more than 4 GiB.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fastalign as fa
from bench.harness import run_file
from fastalign.losses.policy import clip

WIDTH = 64
PAIR = 256  # tokens of a completion in the preference loss


def nll(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return fa.linear_loss(hidden, weight, targets, lambda logp, _: -logp.sum() / len(targets))[0]


def logp(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return -fa.linear_logp(hidden, weight, targets).mean()


def grpo(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    advantages = torch.linspace(-1, 1, len(targets), device=hidden.device)
    offsets = torch.tensor([0, len(targets)])

    def objective(values: Tensor, span: slice) -> Tensor:
        return clip(values, values.detach(), advantages[span], offsets).sum() / len(targets)

    return fa.linear_loss(hidden, weight, targets, objective)[0]


def dpo(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    units = torch.arange(0, len(targets) + 1, 2 * PAIR)

    def objective(values: Tensor, span: slice) -> Tensor:
        win, lose = values.view(-1, 2, PAIR).sum(2).unbind(1)
        return -F.logsigmoid(0.1 * (win - lose)).sum() * 2 * PAIR / len(targets)

    return fa.linear_loss(hidden, weight, targets, objective, units=units)[0]


def kl(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    row_weight = torch.full((len(targets),), 1 / len(targets), device=hidden.device)
    return fa.linear_kl(hidden, weight, hidden.detach().flip(1), weight.detach().flip(1), row_weight=row_weight)


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return fa.linear_cross_entropy(hidden, weight, targets)


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "linear_loss": nll,
    "linear_logp": logp,
    "linear_cross_entropy": cross_entropy,
    "linear_kl": kl,
    "dpo": dpo,
    "grpo": grpo,
}


def step(loss: Callable[..., Tensor], rows: int, vocab: int, dtype: torch.dtype, device: str) -> tuple[Callable[[], None], int]:
    """A forward and backward, and the bytes of the gradients that it leaves."""
    hidden = torch.randn(rows, WIDTH, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, WIDTH, device=device) / 8).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (rows,), device=device)

    def run() -> None:
        hidden.grad = weight.grad = None
        loss(hidden, weight, targets).backward()

    return run, (hidden.numel() + weight.numel()) * hidden.element_size()


@pytest.mark.parametrize("name", LOSSES)
def bench_memory_against_tokens(versus, device, quick, name):
    vocab = 8192 if quick else 16384
    for rows in (1024, 4096) if quick else (1024, 8192, 32768):
        run, gradients = step(LOSSES[name], rows, vocab, torch.float32, device)
        sides = {"fastalign": run}
        if name == "linear_loss" and rows * vocab * 4 < 4 << 30:
            sides["torch"], _ = step(eager, rows, vocab, torch.float32, device)
        versus(f"sweep T: {name}", f"T={rows} V={vocab} H={WIDTH}", torch.float32, sides, beside=gradients)


def bench_time_against_vocabulary(versus, device, quick):
    rows = 256 if quick else 512
    for vocab in (8192, 32768) if quick else (8192, 32768, 151936, 262144):
        sides = {
            "fastalign": step(nll, rows, vocab, torch.bfloat16, device)[0],
            "torch": step(eager, rows, vocab, torch.bfloat16, device)[0],
        }
        versus("sweep V: linear_loss", f"T={rows} V={vocab} H={WIDTH}", torch.bfloat16, sides)


if __name__ == "__main__":
    run_file(__file__)
