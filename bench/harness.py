"""Timing and memory of benches: runs interleaved so that every side sees the same machine, the best of several is kept."""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

COLUMNS = ("op", "shape", "dtype", "backend", "ms", "GFLOP/s", "peak MiB", "x torch", "x floor")
WIDTHS = (34, 26, 9, 10, 9, 8, 9, 8, 8)


@dataclass(frozen=True)
class Result:
    """One line: time of the best run in ms, GEMM work in FLOP, peak memory above the start in MiB."""

    op: str
    shape: str
    dtype: str
    backend: str
    ms: float
    flop: float = 0.0
    peak_mib: float | None = None
    torch_ms: float | None = None
    floor_ms: float | None = None

    def line(self) -> str:
        """The columns of `header`; `x torch` is how many times faster than torch, `x floor` how many times the floor's time."""
        rate = f"{self.flop / self.ms / 1e6:.0f}" if self.flop else "-"
        peak = "-" if self.peak_mib is None else f"{self.peak_mib:.0f}"
        faster = "-" if self.torch_ms is None else f"{self.torch_ms / self.ms:.2f}"
        slower = "-" if self.floor_ms is None else f"{self.ms / self.floor_ms:.2f}"
        return _columns((self.op, self.shape, self.dtype, self.backend, f"{self.ms:.1f}", rate, peak, faster, slower))


def header() -> str:
    """Names of the columns."""
    return _columns(COLUMNS)


def interleaved(cases: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Best time of each case in ms over `rounds` rounds, every case once a round, after one round that is not counted.

    `clock=time.process_time` counts CPU time of all threads instead: the figure for a machine that others use too.
    """
    best = dict.fromkeys(cases, float("inf"))
    for number in range(rounds + 1):
        for name, run in cases.items():
            _synchronize()
            start = clock()
            run()
            _synchronize()
            if number:
                best[name] = min(best[name], 1e3 * (clock() - start))
    return best


def peak_mib(run: Callable[[], object]) -> float:
    """How far the resident memory of the process (the device's allocated memory on a GPU) rises above its start while `run` runs."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        _synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    reset.write_text("5")  # resets the high-water mark
    before = _status_kib("VmRSS")
    run()
    return (_status_kib("VmHWM") - before) / 1024


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _columns(cells: tuple[str, ...]) -> str:
    return " ".join(cell.ljust(w) if i < 4 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, WIDTHS, strict=True)))
