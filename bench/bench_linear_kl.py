"""linear_kl, forward + backward, against eager torch as distillation trainers write it, Liger's fused JSD, and its own GEMMs alone.

    python bench/bench_linear_kl.py [--quick] [--rounds 5] [--dtype float32] [--clock wall|cpu] [--threads N]

The floor is the GEMMs of the op into buffers that exist: student and teacher forward, dL/dhidden, dL/dweight (8TVH); per token both
forwards twice (12TVH); with a frozen student head without dL/dweight (6TVH). torch: F.linear, log_softmax in fp32, F.kl_div.
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

from bench.harness import peak_mib, run_file
from fastalign.ops.linear_head import release_buffers
from fastalign.ops.linear_kl import linear_kl

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


class Case:
    """Inputs of one shape and dtype, and one forward + backward of each side."""

    def __init__(self, rows: int, vocab: int, width: int, dtype: torch.dtype, device: str, *, frozen: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

        self.hidden, self.teacher_hidden = normal(rows, width).requires_grad_(), normal(rows, width)
        self.weight, self.teacher_weight = (normal(vocab, width, scale=width**-0.5) for _ in range(2))
        self.weight.requires_grad_(not frozen)
        self.mean = torch.full((rows,), 1.0 / rows, device=device)
        self.shape, self.tvh = f"T={rows} V={vocab} H={width}", float(rows) * vocab * width

    def backward(self, loss: Tensor) -> None:
        """One backward into fresh gradients."""
        self.hidden.grad = self.weight.grad = None
        loss.backward()

    def ours(self, divergence: str, *, per_token: bool = False) -> Callable[[], object]:
        heads = (self.hidden, self.weight, self.teacher_hidden, self.teacher_weight)
        if per_token:
            return lambda: self.backward(linear_kl(*heads, divergence=divergence).mean())
        return lambda: self.backward(linear_kl(*heads, divergence=divergence, row_weight=self.mean))

    def torch(self, divergence: str) -> Callable[[], object]:
        """The logits of both in memory; log-probs in fp32."""

        def run() -> None:
            s = torch.log_softmax(F.linear(self.hidden, self.weight).float(), -1)
            t = torch.log_softmax(F.linear(self.teacher_hidden, self.teacher_weight).float(), -1)
            self.backward(eager(s, t, divergence) / len(s))

        return run

    def liger(self) -> Callable[[], object]:
        """Its fused JSD with no hard loss."""
        module = pytest.importorskip("liger_kernel.chunked_loss.jsd_loss", reason="Liger is not installed")
        loss = module.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=self.hidden.is_cuda)
        labels = torch.zeros(len(self.hidden), dtype=torch.int64, device=self.hidden.device)
        return lambda: self.backward(loss(self.hidden, self.weight, self.teacher_hidden, self.teacher_weight, labels))

    def floor(self, tvh: int) -> Callable[[], object]:
        """8, 12 or 6 TVH of GEMMs."""
        x, w = self.hidden.detach(), self.weight.detach()
        logits, teacher = torch.empty(2, len(x), len(w), dtype=x.dtype, device=x.device)
        d_hidden, d_weight = torch.empty_like(x), torch.empty_like(w)

        def run() -> None:
            for _ in range(2 if tvh == 12 else 1):
                torch.mm(x, w.t(), out=logits)
                torch.mm(self.teacher_hidden, self.teacher_weight.t(), out=teacher)
            torch.mm(logits, w, out=d_hidden)
            if tvh > 6:
                torch.mm(logits.t(), x, out=d_weight)

        return run


def eager(s: Tensor, t: Tensor, divergence: str) -> Tensor:
    """The sum over the rows by F.kl_div; kl_div(log q, log p) is KL(p‖q)."""
    if divergence == "forward_kl":
        return F.kl_div(s, t, reduction="sum", log_target=True)
    if divergence == "reverse_kl":
        return F.kl_div(t, s, reduction="sum", log_target=True)
    m = torch.logsumexp(torch.stack((s, t)), 0) - torch.tensor(2.0).log()
    return 0.5 * (F.kl_div(m, t, reduction="sum", log_target=True) + F.kl_div(m, s, reduction="sum", log_target=True))


def sizes(quick: bool) -> tuple[int, int, int]:
    """rows, vocab, width"""
    return (256, 16000, 512) if quick else (512, 151936, 896)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def bench_linear_kl(versus, device, quick, dtype, divergence):
    """The weighted sum, its gradient taken in the forward."""
    case = Case(*sizes(quick), dtype, device)
    sides = {"fastalign": case.ours(divergence), "torch": case.torch(divergence), "floor": case.floor(8)}
    if divergence == "jsd":
        sides["liger"] = case.liger()
    versus(f"linear_kl {divergence}", case.shape, dtype, sides, flop=8 * case.tvh)


def bench_linear_kl_per_token(versus, device, quick, dtype):
    case = Case(*sizes(quick), dtype, device)
    sides = {"fastalign": case.ours("jsd", per_token=True), "torch": case.torch("jsd"), "floor": case.floor(12)}
    versus("linear_kl jsd, per token", case.shape, dtype, sides, flop=12 * case.tvh)


def bench_linear_kl_frozen_head(versus, device, quick, dtype):
    case = Case(*sizes(quick), dtype, device, frozen=True)
    sides = {"fastalign": case.ours("jsd"), "torch": case.torch("jsd"), "floor": case.floor(6)}
    versus("linear_kl jsd, frozen head", case.shape, dtype, sides, flop=6 * case.tvh)


def bench_linear_kl_memory(benchmark, device, dtype):
    """Peak memory as the rows grow fourfold: two chunks of logits, whatever T. A narrow head, so that the logits dominate."""
    peaks = []
    vocab, rows_of = 151936, (512, 2048)
    for rows in rows_of:
        case = Case(rows, vocab, 32, dtype, device)
        run = case.ours("jsd")
        run()  # loads what is loaded once
        release_buffers()
        case.hidden.grad = case.weight.grad = None
        peaks.append(peak_mib(run))
    logits = 2 * rows_of[1] * vocab * dtype.itemsize / 2**20
    peak = " and ".join(f"{p:.0f} MiB at T={rows}" for p, rows in zip(peaks, rows_of, strict=True))
    print(f"memory: linear_kl V={vocab} H=32 {dtype}: peak {peak}; the logits of both sides would be {logits:.0f} MiB")
    benchmark.pedantic(run, rounds=1, iterations=1)


if __name__ == "__main__":
    run_file(__file__)
