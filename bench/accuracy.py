"""The accuracy table: every op on every backend against fp64, beside what plain torch makes of the same inputs in the same dtype.

    python -m bench.accuracy [--quick] [--op NAME ...]

An error is the largest deviation from the fp64 result over the largest value of that result; of a rate it is the rate itself. A row holds
when our error is at most 1.25 times plain torch's plus 2e-6 (fp32 rounding in another order of summation). Ends with status 1 when a row
fails.

A new op is one function in a file bench/accuracy_<anything>.py, which is found by its name:

    @accuracy("preference", dtypes=(torch.float32,))
    def preference(at: At) -> Case:
        logp = at.randn(64)
        exact = {"loss": reference(logp.double())}                  # what the numbers are, fp64
        plain = {"loss": eager(logp)}                               # what torch makes of them
        return Case(lambda: {"loss": ours(logp)}, plain, exact)     # ours is called once a backend

The op's name is the stem of its native and Triton sources: it decides on which backends the function runs.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastalign.ops.backend import has_triton, load_native, use_backend

FACTOR, SLACK = 1.25, 2e-6
INTERPRETED = "triton (interp.)"
Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class At:
    """Where a case is built: dtype and device of its inputs; `quick` asks for small shapes."""

    dtype: torch.dtype
    device: str
    quick: bool

    def randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers of the case's dtype, seeded by main."""
        return (torch.randn(*shape, dtype=torch.float64) * scale).to(self.device, self.dtype)

    def randint(self, high: int, *shape: int) -> Tensor:
        """Integers in [0, high)."""
        return torch.randint(high, shape).to(self.device)


@dataclass(frozen=True)
class Case:
    """ours() is run on each backend; plain is torch in the inputs' dtype; exact is fp64. The same names in all three."""

    ours: Callable[[], Values]
    plain: Values
    exact: Values
    rates: tuple[str, ...] = ()  # values that are error rates already


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    op: str
    value: str
    backend: str
    dtype: str
    error: float
    plain: float

    @property
    def holds(self) -> bool:
        """Whether our error is no worse than plain torch's; NaN is not."""
        return self.error <= FACTOR * self.plain + SLACK

    def line(self) -> str:
        """The columns of HEADER."""
        verdict = "hold" if self.holds else "FAIL"
        return f"{self.op:<26} {self.value:<14} {self.backend:<17} {self.dtype:<9} {self.error:>10.2e} {self.plain:>12.2e}  {verdict}"


HEADER = f"{'op':<26} {'value':<14} {'backend':<17} {'dtype':<9} {'our error':>10} {'plain torch':>12}"
Build = Callable[[At], Case]
CASES: list[tuple[str, str, tuple[torch.dtype, ...], Build]] = []


def accuracy(op: str, *, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)) -> Callable[[Build], Build]:
    """Registers a function that builds a case of `op`; the row is named after the function."""

    def add(build: Build) -> Build:
        CASES.append((op, build.__name__, dtypes, build))
        return build

    return add


def load_cases() -> None:
    """Imports every bench/accuracy_*.py."""
    for path in sorted(Path(__file__).parent.glob("accuracy_*.py")):
        importlib.import_module(f"bench.{path.stem}")


@contextmanager
def _isa(name: str) -> Iterator[None]:
    module = load_native()[0]
    assert module is not None
    before = module.isa()
    module.set_isa(name)
    try:
        yield
    finally:
        module.set_isa(before)


def backends(op: str, device: str) -> Iterator[str]:
    """Sets each backend of an op in turn and says its name; on the CPU the native one once an instruction set."""
    with use_backend("reference"):
        yield "reference"
    module, _ = load_native()
    cuda = device == "cuda"
    if module is not None and op in (module.cuda_ops if cuda else module.ops):
        with use_backend("native"):
            for name in ("cuda",) if cuda else module.isas():
                with nullcontext() if cuda else _isa(name):
                    yield f"native {name}"
    if has_triton(op):
        with use_backend("triton"):
            yield "triton" if cuda else INTERPRETED


def error_of(found: Tensor, exact: Tensor) -> float:
    """The largest deviation over the largest exact value; infinite for NaN."""
    exact = exact.detach().double()
    worst = (found.detach().double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30)
    return float(worst.nan_to_num(nan=torch.inf))


def rows(device: str, *, quick: bool, ops: list[str] | None = None) -> Iterator[Row]:
    """Every row of the table."""
    for op, name, dtypes, build in CASES:
        if ops and name not in ops and op not in ops:
            continue
        for dtype in dtypes:
            torch.manual_seed(0)
            case = build(At(dtype, device, quick))
            for backend in backends(op, device):
                if backend == INTERPRETED and dtype == torch.bfloat16:
                    continue  # the interpreter cuts fp32 off to bf16 where a GPU rounds
                for value, found in case.ours().items():
                    errors = [float(v) if value in case.rates else error_of(v, case.exact[value]) for v in (found, case.plain[value])]
                    yield Row(name, value, backend, str(dtype).removeprefix("torch."), *errors)


def main() -> int:
    """Prints the table; 1 when a row fails."""
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--op", nargs="+", help="only these")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is imported
    load_cases()
    known = {name for op, name, _, _ in CASES} | {op for op, _, _, _ in CASES}
    unknown = sorted(set(options.op or []) - known)
    if unknown:
        parser.error(f"--op: unknown {', '.join(unknown)}; valid: {', '.join(sorted(known))}")
    print(HEADER)
    found = []
    for row in rows(device, quick=options.quick, ops=options.op):
        found.append(row)
        print(row.line(), flush=True)
    failed = [row for row in found if not row.holds]
    print(f"{len(found)} rows, {len(failed)} fail")
    return 1 if failed or not found else 0


if __name__ == "__main__":
    from bench.accuracy import main as run  # the module that the cases register with, not __main__

    sys.exit(run())
