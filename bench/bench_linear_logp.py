"""linear_loss, linear_cross_entropy and linear_logp, forward + backward, against torch eager and against their own GEMMs alone.

    python bench/bench_linear_logp.py [--quick] [--rounds 5] [--dtype float32 bfloat16] [--clock wall|cpu] [--threads N]

The floor is the GEMMs of the op alone (forward, dL/dhidden, dL/dweight) into buffers that exist. With main_grad our head
gradient goes to memory that exists too; without it, autograd gets a fresh one. torch: F.linear + F.cross_entropy.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.harness import Result, header, interleaved, peak_mib
from fastalign.ops.backend import backend_for
from fastalign.ops.linear_cross_entropy import linear_cross_entropy
from fastalign.ops.linear_head import release_buffers
from fastalign.ops.linear_logp import linear_logp
from fastalign.ops.linear_loss import linear_loss


class Case:
    """Inputs of one shape and dtype, and one forward + backward of each side."""

    def __init__(self, rows: int, vocab: int, width: int, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows, self.vocab, self.width, self.dtype = rows, vocab, width, dtype
        self.hidden = torch.randn(rows, width, generator=generator).to(device, dtype).requires_grad_()
        self.weight = (torch.randn(vocab, width, generator=generator) * width**-0.5).to(device, dtype).requires_grad_()
        self.targets = torch.randint(vocab, (rows,), generator=generator).to(device)
        self.half = self.targets.masked_fill(torch.arange(rows, device=device) % 2 == 0, -100)
        self.tvh = float(rows) * vocab * width

    def clear(self) -> None:
        """Forgets the gradients of the last run."""
        self.hidden.grad = self.weight.grad = None

    def loss(self, *, main_grad: bool = False, frozen: bool = False) -> Callable[[], object]:
        """linear_loss with a plain negative log-likelihood."""
        held = torch.zeros(self.vocab, self.width, device=self.hidden.device) if main_grad else None

        def run() -> None:
            self.clear()
            weight = self.weight.detach() if frozen else self.weight
            if held is not None:
                weight.main_grad = held  # type: ignore[attr-defined]
            linear_loss(self.hidden, weight, self.targets, lambda logp, _: -logp.sum() / self.rows)[0].backward()
            if held is not None:
                del weight.main_grad  # type: ignore[attr-defined]

        return run

    def entropy(self, targets: Tensor) -> Callable[[], object]:
        """linear_cross_entropy."""

        def run() -> None:
            self.clear()
            linear_cross_entropy(self.hidden, self.weight, targets).backward()

        return run

    def logp(self) -> Callable[[], object]:
        """linear_logp and a scalar of it."""

        def run() -> None:
            self.clear()
            (-linear_logp(self.hidden, self.weight, self.targets).mean()).backward()

        return run

    def eager(self, targets: Tensor) -> Callable[[], object]:
        """torch with the logits in memory."""

        def run() -> None:
            self.clear()
            F.cross_entropy(F.linear(self.hidden, self.weight), targets).backward()

        return run

    def floor(self, *, frozen: bool = False) -> Callable[[], object]:
        """The GEMMs alone, into existing buffers."""
        x, w = self.hidden.detach(), self.weight.detach()
        logits = torch.empty(self.rows, self.vocab, dtype=self.dtype, device=x.device)
        d_hidden, d_weight = torch.empty_like(x), torch.empty_like(w)

        def run() -> None:
            torch.mm(x, w.t(), out=logits)
            torch.mm(logits, w, out=d_hidden)
            if not frozen:
                torch.mm(logits.t(), x, out=d_weight)

        return run


def bench(case: Case, rounds: int, clock: Callable[[], float], *, big: bool) -> list[Result]:
    """All lines of one shape."""
    runs: dict[str, Callable[[], object]] = {
        "floor": case.floor(),
        "linear_loss (main_grad)": case.loss(main_grad=True),
        "linear_loss": case.loss(),
        "linear_cross_entropy": case.entropy(case.targets),
        "torch": case.eager(case.targets),
        "linear_cross_entropy (half masked)": case.entropy(case.half),
        "torch (half masked)": case.eager(case.half),
    }
    if big:
        runs |= {"floor, frozen": case.floor(frozen=True), "linear_loss (frozen head)": case.loss(frozen=True), "linear_logp": case.logp()}
    best = interleaved(runs, rounds, clock)
    case.clear()
    results = []
    for name, run in runs.items():
        release_buffers()
        case.clear()
        peak = peak_mib(run)
        case.clear()
        masked, frozen = "half" in name, "frozen" in name
        ours = name.startswith("linear")
        floor = best.get("floor, frozen" if frozen else "floor")
        eager = best["torch (half masked)" if masked else "torch"]
        flop = (4 if frozen else 8 if name == "linear_logp" else 3 if masked and ours else 6) * case.tvh
        results.append(
            Result(
                name,
                f"T={case.rows} V={case.vocab} H={case.width}",
                str(case.dtype).removeprefix("torch."),
                backend_for("linear_logp", case.hidden.device) if ours else "torch",
                best[name],
                flop,
                peak,
                None if not ours else eager,
                None if not ours or masked else floor,
            )
        )
    return results


def memory(dtype: torch.dtype, device: str) -> None:
    """Peak memory of linear_loss as the rows grow: one chunk of logits, whatever T. A narrow head, so that the logits dominate."""
    for rows in (512, 4096):
        case = Case(rows, 151936, 64, dtype, device)
        run = case.loss()
        run()  # loads what is loaded once
        release_buffers()
        case.clear()
        peak = peak_mib(run)
        logits = rows * case.vocab * dtype.itemsize / 2**20
        name = str(dtype).removeprefix("torch.")
        print(
            f"memory: linear_loss T={rows} V={case.vocab} H={case.width} {name}: peak {peak:.0f} MiB; all logits would be {logits:.0f} MiB"
        )


def main() -> None:
    """Reads the flags, prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one small vocabulary, three rounds")
    parser.add_argument("--rounds", type=int, default=0, help="interleaved rounds (default 5, quick 3)")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: CPU time of all threads, for a machine that is shared"
    )
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vocab, width = (32000, 512) if options.quick else (151936, 896)
    print(f"{torch.get_num_threads()} threads, {options.clock} time, torch {torch.__version__}")
    print(header())
    for name in options.dtype:
        dtype = getattr(torch, name)
        case = Case(options.rows, vocab, width, dtype, device)
        for result in bench(case, options.rounds or (3 if options.quick else 5), clock, big=not options.quick):
            print(result.line(), flush=True)
        if not options.quick:
            memory(dtype, device)


if __name__ == "__main__":
    main()
