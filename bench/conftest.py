"""Options of the benches, and the fixture that measures sides against each other."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.harness import Result, flush_caches, header, peak_mib, products_are_emulated, timed, write_results
from fastalign.ops.linear_head import release_buffers

RESULTS = pytest.StashKey[list[Result]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastalign benches")
    group.addoption("--quick", action="store_true", help="small shapes and few rounds")
    group.addoption("--rounds", type=int, default=0, help="interleaved rounds of every side (default 5, quick 2)")
    group.addoption("--dtype", action="append", choices=["float32", "bfloat16"], help="repeatable; default both")
    group.addoption("--clock", choices=["wall", "cpu"], default="wall", help="cpu: CPU time of all threads, for a machine that is shared")
    group.addoption("--threads", type=int, default=0, help="torch threads (default: torch's choice)")
    group.addoption("--results", metavar="FILE.json", help="write every line with device, date and commit")


class Rounds:
    """What `versus` needs of pytest-benchmark, where that is not installed."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, run: Callable[[], object], *, setup: Callable[[], object], rounds: int, iterations: int) -> None:
        for _ in range(rounds):
            setup()
            for _ in range(iterations):
                run()


class WithoutPlugin:
    @pytest.fixture
    def benchmark(self) -> Rounds:
        return Rounds()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = []
    if not config.pluginmanager.hasplugin("benchmark"):
        config.pluginmanager.register(WithoutPlugin())
    if config.getoption("--threads"):
        torch.set_num_threads(config.getoption("--threads"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A bench that takes `dtype` runs for each one asked for."""
    if "dtype" in metafunc.fixturenames:
        names = metafunc.config.getoption("--dtype") or ["float32", "bfloat16"]
        metafunc.parametrize("dtype", [getattr(torch, name) for name in names], ids=names)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    results = config.stash[RESULTS]
    if not results:
        return
    terminalreporter.write_line("")
    terminalreporter.write_line(f"{torch.get_num_threads()} threads, {config.getoption('--clock')} time, torch {torch.__version__}")
    for line in (header(), *(result.line() for result in results)):
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def quick(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("--quick"))


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


Versus = Callable[..., dict[str, Result]]


@pytest.fixture
def versus(benchmark: Any, pytestconfig: pytest.Config, quick: bool) -> Versus:
    """versus(op, shape, dtype, sides, flop=, bytes=, memory=, beside=, cold=) measures the sides in turn and returns a Result a side.

    sides: name → callable. "fastalign…" are ours, "floor" is the cost of the work that cannot be left out, "torch" is what the ratio is
    taken against; others ("torch.compile", "liger") are more peers. The first of ours is what pytest-benchmark records; the other sides
    run before each of its rounds, so every round times every side once, each with cold caches.
    cold=False: every side has just run, as an op has whose inputs the step before has written.
    Ours alone run where the work is 16-bit products (flop) and torch has no instructions for them: there is nothing to compare with.
    beside: bytes that are left out of the peak (the gradients that every side returns).
    """
    rounds = pytestconfig.getoption("--rounds") or (2 if quick else 5)
    taken: list[str] = []
    clock = time.process_time if pytestconfig.getoption("--clock") == "cpu" else time.perf_counter

    def measure(
        op: str,
        shape: str,
        dtype: torch.dtype | str,
        sides: Mapping[str, Callable[[], object]],
        *,
        flop: float = 0.0,
        bytes: float = 0.0,
        memory: bool = True,
        beside: int = 0,
        cold: bool = True,
    ) -> dict[str, Result]:
        if flop and isinstance(dtype, torch.dtype) and not torch.cuda.is_available() and products_are_emulated(dtype):
            print(f"\n{op} {dtype}: this CPU has no 16-bit products for torch, whose sides are left out")
            sides = {name: run for name, run in sides.items() if name.startswith("fastalign")}
        first = next(name for name in sides if name.startswith("fastalign"))
        times: dict[str, list[float]] = {name: [] for name in sides}
        for run in sides.values():
            run()  # loads and allocates what is loaded and allocated once
        few = 1 if op.startswith("sweep") else rounds  # a curve needs no medians

        def round_of_all() -> None:
            for name, run in sides.items():
                flush_caches() if cold else run()
                times[name].append(timed(run, clock))
            flush_caches() if cold else sides[first]()

        if taken:  # pytest-benchmark records one case a function, the first
            for _ in range(few):
                round_of_all()
        else:
            taken.append(op)
            benchmark.pedantic(sides[first], setup=round_of_all, rounds=few, iterations=1)
        peaks: dict[str, float | None] = {}
        for name, run in sides.items():
            release_buffers()  # what our ops keep between calls counts as theirs
            peaks[name] = max(0.0, peak_mib(run) - beside / 2**20) if memory else None
        results = Result.table(op, shape, str(dtype).removeprefix("torch."), times, peaks, flop=flop, bytes=bytes)
        benchmark.extra_info.update({name: result.ms for name, result in results.items()})
        pytestconfig.stash[RESULTS].extend(results.values())
        if pytestconfig.getoption("--results"):  # after every case: a run that is cut short leaves what it has measured
            write_results(Path(pytestconfig.getoption("--results")), pytestconfig.stash[RESULTS])
        return results

    return measure
