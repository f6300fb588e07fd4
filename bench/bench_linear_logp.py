"""linear_loss, linear_cross_entropy and linear_logp, forward + backward, against torch and against their own GEMMs alone.

    python bench/bench_linear_logp.py [--quick] [--rounds 5] [--dtype float32 --dtype bfloat16] [--clock wall|cpu] [--threads N]

The floor is the GEMMs of the op alone (forward, dL/dhidden, dL/dweight) into buffers that exist. Sides:
- fastalign: with main_grad, so that the head gradient goes to memory that exists too; "fresh grad": autograd gets a fresh one;
  "fp32 logits": head_dtype=float32.
- torch: F.linear, logits upcast to fp32, cross_entropy, as transformers' and TRL's losses do; "16-bit loss": without the upcast.
- torch.compile: the first of these compiled, on a GPU alone.
- torch chunked: torch.nn.functional.linear_cross_entropy with LinearCrossEntropyOptions(); on a CPU with --quick alone, whose ratio says
  why: the full size would take minutes.
- liger: its fused linear cross entropy, Triton, on a GPU alone.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.harness import run_file
from fastalign.ops.linear_cross_entropy import linear_cross_entropy
from fastalign.ops.linear_head import release_buffers
from fastalign.ops.linear_logp import linear_logp
from fastalign.ops.linear_loss import linear_loss
from fastalign.ops.logits import grad_rows_, logp_rows

Run = Callable[[], object]


class Inputs:
    """hidden [T, H], weight [V, H], targets [T] of one shape and dtype."""

    def __init__(self, rows: int, vocab: int, width: int, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows, self.vocab, self.width, self.dtype = rows, vocab, width, dtype
        self.hidden = torch.randn(rows, width, generator=generator).to(device, dtype).requires_grad_()
        self.weight = (torch.randn(vocab, width, generator=generator) * width**-0.5).to(device, dtype).requires_grad_()
        self.targets = torch.randint(vocab, (rows,), generator=generator).to(device)
        self.shape = f"T={rows} V={vocab} H={width}"
        self.tvh = float(rows) * vocab * width
        self.main_grad: Tensor | None = None

    def backward_of(self, loss: Callable[[Tensor, Tensor], Tensor], *, frozen: bool = False, main_grad: bool = False) -> Run:
        """loss(hidden, weight) and its backward; no gradient is left behind."""
        weight = self.weight.detach() if frozen else self.weight
        if main_grad and self.main_grad is None:
            self.main_grad = torch.zeros(self.vocab, self.width, device=weight.device)

        def run() -> None:
            self.hidden.grad = self.weight.grad = None
            if main_grad:
                weight.main_grad = self.main_grad  # type: ignore[attr-defined]
            try:
                loss(self.hidden, weight).backward()
            finally:
                if main_grad:
                    del weight.main_grad  # type: ignore[attr-defined]
                self.hidden.grad = self.weight.grad = None

        return run

    def gemms(self, *, frozen: bool = False, backward: bool = True) -> Run:
        """The floor."""
        x, w = self.hidden.detach(), self.weight.detach()
        logits = torch.empty(self.rows, self.vocab, dtype=self.dtype, device=x.device)
        d_hidden, d_weight = torch.empty_like(x), torch.empty_like(w if backward and not frozen else w[:0])

        def run() -> None:
            torch.mm(x, w.t(), out=logits)
            if backward:
                torch.mm(logits, w, out=d_hidden)
                if not frozen:
                    torch.mm(logits.t(), x, out=d_weight)

        return run


def upcast(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def narrow(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), targets)


def peers(case: Inputs, targets: Tensor, quick: bool, *, frozen: bool = False) -> dict[str, Run]:
    """Every other side of a cross entropy."""
    sides = {"torch": case.backward_of(lambda h, w: upcast(h, w, targets), frozen=frozen)}
    if case.dtype != torch.float32:
        sides["torch, 16-bit loss"] = case.backward_of(lambda h, w: narrow(h, w, targets), frozen=frozen)
    on_gpu = case.hidden.is_cuda
    if hasattr(torch.nn, "LinearCrossEntropyOptions") and not frozen and (quick or on_gpu):
        options = torch.nn.LinearCrossEntropyOptions()
        sides["torch chunked"] = case.backward_of(lambda h, w: F.linear_cross_entropy(h, w, targets, options=options))
    if on_gpu:
        fused = torch.compile(upcast)
        compiled = case.backward_of(lambda h, w: fused(h, w, targets), frozen=frozen)
        try:
            compiled()
            sides["torch.compile"] = compiled
        except Exception as error:  # whatever a missing or unfit compiler raises
            print(f"torch.compile is left out: {type(error).__name__}: {str(error).splitlines()[0]}")
    if on_gpu and importlib.util.find_spec("liger_kernel") and not frozen:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        sides["liger"] = case.backward_of(lambda h, w: liger(w, h, targets))
    return sides


def nll(case: Inputs, **options: object) -> Callable[[Tensor, Tensor], Tensor]:
    """linear_loss of a mean negative log-likelihood."""
    return lambda h, w: linear_loss(h, w, case.targets, lambda logp, _: -logp.sum() / case.rows, **options)[0]  # type: ignore[arg-type]


def case_of(quick: bool, dtype: torch.dtype, device: str) -> Inputs:
    release_buffers()
    return Inputs(*((256, 32000, 512) if quick else (512, 151936, 896)), dtype, device)


def bench_linear_loss(versus, device, quick, dtype):
    case = case_of(quick, dtype, device)
    sides = {"fastalign": case.backward_of(nll(case), main_grad=True), "fastalign, fresh grad": case.backward_of(nll(case))}
    if dtype != torch.float32:
        sides["fastalign, fp32 logits"] = case.backward_of(nll(case, head_dtype=torch.float32), main_grad=True)
    sides |= {**peers(case, case.targets, quick), "floor": case.gemms()}
    versus("linear_loss", case.shape, dtype, sides, flop=6 * case.tvh)


def bench_linear_cross_entropy_half_masked(versus, device, quick, dtype):
    """A prompt as long as its completion: half of the rows cost nothing here. The rate is that of the work that is needed."""
    case = case_of(quick, dtype, device)
    half = case.targets.masked_fill(torch.arange(case.rows, device=device) % 2 == 0, -100)
    ours = case.backward_of(lambda h, w: linear_cross_entropy(h, w, half))
    needed = Inputs(case.rows // 2, case.vocab, case.width, dtype, device)
    sides = {"fastalign": ours, **peers(case, half, quick), "floor": needed.gemms()}
    versus("cross_entropy, half masked", case.shape, dtype, sides, flop=3 * case.tvh)


def bench_frozen_head(versus, device, quick, dtype):
    """LoRA: the head takes no gradient, 4TVH."""
    case = case_of(quick, dtype, device)
    ours = {
        "fastalign": case.backward_of(nll(case), frozen=True),
        "fastalign, linear_logp": case.backward_of(lambda h, w: -linear_logp(h, w, case.targets).mean(), frozen=True),
    }
    sides = {**ours, **peers(case, case.targets, quick, frozen=True), "floor": case.gemms(frozen=True)}
    versus("frozen head", case.shape, dtype, sides, flop=4 * case.tvh)


def bench_linear_logp(versus, device, quick, dtype):
    """The differentiable log-prob, whose backward computes the logits again: 8TVH, of which the floor does 6."""
    case = case_of(quick, dtype, device)
    sides = {"fastalign": case.backward_of(lambda h, w: -linear_logp(h, w, case.targets).mean())}
    sides |= {"torch": case.backward_of(lambda h, w: upcast(h, w, case.targets)), "floor": case.gemms()}
    versus("linear_logp", case.shape, dtype, sides, flop=8 * case.tvh)


@torch.no_grad()
def bench_logp_and_entropy_forward(versus, device, quick, dtype):
    """Scoring a rollout: log-probs and entropies, no gradient, 2TVH."""
    case = case_of(quick, dtype, device)
    hidden, weight, targets = case.hidden.detach(), case.weight.detach(), case.targets

    def eager(logits: Tensor) -> tuple[Tensor, Tensor]:
        log_p = torch.log_softmax(logits, -1)
        return log_p.gather(1, targets[:, None]), -(log_p.exp() * log_p).sum(-1)

    sides: dict[str, Run] = {"fastalign": lambda: linear_logp(hidden, weight, targets, return_entropy=True)}
    if dtype != torch.float32:
        sides["fastalign, fp32 logits"] = lambda: linear_logp(hidden, weight, targets, return_entropy=True, head_dtype=torch.float32)
        sides["torch, 16-bit loss"] = lambda: eager(F.linear(hidden, weight))
    sides |= {"torch": lambda: eager(F.linear(hidden, weight).float()), "floor": case.gemms(backward=False)}
    versus("logp + entropy, forward", case.shape, dtype, sides, flop=2 * case.tvh)


def rows_of_logits(quick: bool, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, str]:
    """Logits, targets and their shape's name."""
    rows, vocab = (64, 32000) if quick else (512, 151936)
    logits = (torch.randn(rows, vocab, device=device) * 3).to(dtype)
    return logits, torch.randint(vocab, (rows,), device=device), f"T={rows} V={vocab}"


def bench_logp_rows(versus, device, quick, dtype):
    """The pass over existing logits, one read of them; the floor is a copy (a read and a write)."""
    logits, targets, shape = rows_of_logits(quick, dtype, device)
    other = torch.empty_like(logits)
    sides = {
        "fastalign": lambda: logp_rows(logits, targets),
        "fastalign, + entropy": lambda: logp_rows(logits, targets, entropy=True),
        "torch": lambda: torch.log_softmax(logits, -1).gather(1, targets[:, None]),
        "floor": lambda: other.copy_(logits),
    }
    versus("row pass: logp", shape, dtype, sides, bytes=float(logits.nbytes), memory=False)


def bench_grad_rows(versus, device, quick, dtype):
    """The gradient's pass, a read and a write in place (of a gradient, from the second round on: the same work); the floor is a copy."""
    logits, targets, shape = rows_of_logits(quick, dtype, device)
    other, g = logits.clone(), torch.full((len(logits),), 1 / len(logits), device=device)
    _, lse, entropy, _ = logp_rows(logits, targets, entropy=True)
    sides = {
        "fastalign": lambda: grad_rows_(other, targets, lse, None, g, None),
        "fastalign, + entropy": lambda: grad_rows_(other, targets, lse, entropy, g, g),
        "floor": lambda: other.copy_(logits),
    }
    versus("row pass: gradient", shape, dtype, sides, bytes=2.0 * logits.nbytes, memory=False)


if __name__ == "__main__":
    run_file(__file__)
