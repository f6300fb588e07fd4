"""Timing and memory of benches: the sides of a case run in turn, so that each sees the same machine, and ratios come from one run."""

from __future__ import annotations

import ctypes
import datetime
import functools
import gc
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.peers.machine import processor

COLUMNS = ("op", "shape", "dtype", "side", "ms", "rate", "peak MiB", "x torch", "x floor")
WIDTHS = (28, 30, 9, 26, 10, 12, 9, 8, 8)


@dataclass(frozen=True)
class Result:
    """One side of one case: median time in ms, the op's work (FLOP or bytes), peak memory above the start in MiB, peers of the same run."""

    op: str
    shape: str
    dtype: str
    backend: str
    ms: float
    flop: float = 0.0
    peak_mib: float | None = None
    torch_ms: float | None = None
    floor_ms: float | None = None
    bytes: float = 0.0

    @classmethod
    def table(
        cls,
        op: str,
        shape: str,
        dtype: str,
        times: Mapping[str, Sequence[float]],
        peaks: Mapping[str, float | None],
        *,
        flop: float = 0.0,
        bytes: float = 0.0,
    ) -> dict[str, Result]:
        """A result a side from the times of all rounds; ratios against the sides named "torch" and "floor"."""
        ms = {name: statistics.median(values) for name, values in times.items()}
        return {
            name: cls(op, shape, dtype, name, ms[name], flop, peaks.get(name), ms.get("torch"), ms.get("floor"), bytes) for name in times
        }

    def line(self) -> str:
        """The columns of `header`; `x torch` is how many times faster than torch, `x floor` how many times the floor's time."""
        rate = f"{self.flop / self.ms / 1e6:.0f} GFLOP/s" if self.flop else f"{self.bytes / self.ms / 1e6:.1f} GB/s" if self.bytes else "-"
        peak = "-" if self.peak_mib is None else f"{self.peak_mib:.0f}"
        faster = "-" if self.torch_ms is None else f"{self.torch_ms / self.ms:.2f}"
        slower = "-" if self.floor_ms is None else f"{self.ms / self.floor_ms:.2f}"
        time_ms = f"{self.ms:.1f}" if self.ms >= 10 else f"{self.ms:.3f}"
        return _columns((self.op, self.shape, self.dtype, self.backend, time_ms, rate, peak, faster, slower))


def header() -> str:
    """Names of the columns."""
    return _columns(COLUMNS)


def run_file(path: str) -> None:
    """`python bench/bench_<op>.py [options]`: that file under pytest with the options of bench/conftest.py."""
    import pytest

    here = Path(__file__).parent
    bare = importlib.util.find_spec("pytest_benchmark") is None or "PYTEST_DISABLE_PLUGIN_AUTOLOAD" in os.environ
    plain = ["-o", "addopts=-q -p no:cacheprovider"] if bare else []  # the file's own options are pytest-benchmark's
    sys.exit(pytest.main(["-c", str(here / "pytest.ini"), "--rootdir", str(here), *plain, path, *sys.argv[1:]]))


def timed(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Milliseconds of one call."""
    _synchronize()
    start = clock()
    run()
    _synchronize()
    return 1e3 * (clock() - start)


_FLUSH_BYTES = 128 << 20  # more than the last-level cache
_flush: list[torch.Tensor] = []


@functools.cache
def products_are_emulated(dtype: torch.dtype) -> bool:
    """Whether torch multiplies this 16-bit dtype on the CPU without instructions for it: 50 times as slow as fp32, minutes a side."""
    if dtype == torch.float32:
        return False
    x, y = torch.ones(128, 1024), torch.ones(1024, 512)
    narrow_x, narrow_y = x.to(dtype), y.to(dtype)
    plain = min(timed(lambda: x @ y) for _ in range(3))
    return min(timed(lambda: narrow_x @ narrow_y) for _ in range(3)) > 8 * plain


def flush_caches() -> None:
    """Overwrites a buffer larger than the caches, so that the next call reads its inputs from memory."""
    if not _flush:
        _flush.append(torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda" if torch.cuda.is_available() else "cpu"))
    _flush[0].fill_(0)


def write_results(path: Path, results: Sequence[Result]) -> None:
    """Everything measured to one JSON file."""
    write_record(path, {"results": [asdict(result) for result in results]})


def write_record(path: Path, found: Mapping[str, object]) -> None:
    """What was found, with the device, date, commit and torch it was found on, as JSON; written whole or not at all."""
    record = {**taken(), **found}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def taken() -> dict[str, str]:
    """The device, date, commit and torch of what is measured now."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{processor()}, {torch.get_num_threads()} threads"
    today = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
    return {"device": name, "date": today, "commit": commit(), "torch": torch.__version__}


def commit() -> str:
    """The short commit, with + behind it when the tree has changes; empty outside a checkout."""
    here = Path(__file__).parent
    try:
        name = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
        tree = ["git", "status", "--porcelain", "--", "..", ":!results"]  # results are what a run leaves
        changed = subprocess.run(tree, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
    return name + ("+" if changed else "")


def interleaved(cases: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Best time of each case in ms over `rounds` rounds, every case once a round, after one round that is not counted.

    `clock=time.process_time` counts CPU time of all threads instead: the figure for a machine that others use too.
    """
    for run in cases.values():
        run()
    return {name: min(times) for name, times in rounds_of(cases, rounds, clock).items()}


def rounds_of(
    cases: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Times of each case in ms, one a round, every case once a round; odd rounds go backwards."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for i in range(rounds):
        for name, run in list(cases.items())[:: -1 if i % 2 else 1]:
            times[name].append(timed(run, clock))
    return times


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
    _trim()
    reset.write_text("5")  # resets the high-water mark
    before = _status_kib("VmRSS")
    run()
    return (_status_kib("VmHWM") - before) / 1024


def _trim() -> None:
    """Gives freed memory back to the system, where the C library can: what it keeps would be used again unseen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


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
