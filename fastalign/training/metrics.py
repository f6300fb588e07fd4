"""Metrics: sums over micro-batches and steps in, one JSON object a logging step out, under TRL's keys.

A mean is kept as (sum, count) until a row is written, so it does not depend on how the batch was cut; tensors are
summed where they are and read once a row, so a GPU is not waited for in between.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

import torch
import yaml
from torch import Tensor

from .files import disk_errors, write_atomic
from .progress import Progress
from .trackers import open_trackers

Number: TypeAlias = float | int | Tensor


class Metrics:
    """Writes the numbers of a run to `output_dir` and to trackers.

    Args:
        output_dir: gets metrics.jsonl, config.yaml and summary.json.
        report_to: trackers, comma-separated, or "none".
        run_name: the run's name in the trackers; empty: the last part of output_dir.
        config: the resolved configuration; written as config.yaml unless empty.
        total_steps: the length of the progress bar; 0: unknown.
        logging_steps: optimizer steps a row.
        progress: show a bar on a terminal, or one line a row elsewhere.

    Raises:
        ValueError: logging_steps below 1, an unknown tracker, or one whose package is not installed.
        OSError: the disk is full.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        report_to: str = "none",
        run_name: str = "",
        config: Mapping[str, Any] | None = None,
        total_steps: int = 0,
        logging_steps: int = 1,
        progress: bool = True,
    ) -> None:
        if logging_steps < 1:
            raise ValueError(f"--logging_steps must be >= 1, got {logging_steps}")
        self.logging_steps = logging_steps
        self.output_dir = Path(output_dir)
        self.path = self.output_dir / "metrics.jsonl"
        with disk_errors(self.output_dir):
            self.output_dir.mkdir(parents=True, exist_ok=True)
        if config:
            write_atomic(self.output_dir / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
        name = run_name or self.output_dir.resolve().name
        self.trackers = open_trackers(report_to, self.output_dir, name, dict(config or {}))
        self.progress = Progress(total_steps) if progress else None
        self.num_tokens = 0
        self._sums: dict[str, tuple[Number, Number]] = {}
        self._extremes: dict[str, float] = {}
        self._values: dict[str, float] = {}
        self._steps, self._tokens, self._started = 0, 0, time.perf_counter()
        cut_partial_line(self.path)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (open for the length of the run)

    def add(self, name: str, total: Number, count: Number = 1) -> None:
        """Adds to the mean of `name`: `total` is a sum over `count` items. A tensor is detached and not waited for."""
        known = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (known[0] + _detached(total), known[1] + _detached(count))

    def lowest(self, name: str, value: Number) -> None:
        """Keeps the smallest value since the last row."""
        self._extremes[name] = min(float(value), self._extremes.get(name, math.inf))

    def highest(self, name: str, value: Number) -> None:
        """Keeps the largest value since the last row."""
        self._extremes[name] = max(float(value), self._extremes.get(name, -math.inf))

    def put(self, **values: float) -> None:
        """Sets values of which the last one counts: learning_rate, epoch."""
        self._values.update(values)

    def count_tokens(self, count: int) -> None:
        """Counts tokens for num_tokens (over the run) and tokens_per_second (since the last row)."""
        self._tokens += count
        self.num_tokens += count

    @contextmanager
    def timer(self, phase: str) -> Iterator[None]:
        """Adds the block's wall time to `timing_s/{phase}`, which is seconds a step."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(f"timing_s/{phase}", time.perf_counter() - start, 0)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The block's wall time is left out of step_time and tokens_per_second, as an evaluation's should be."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._started += time.perf_counter() - start

    def end_step(self, step: int) -> dict[str, float] | None:
        """Ends optimizer step `step` (counted from 1); returns the row when this is a logging step."""
        self._steps += 1
        if step % self.logging_steps == 0:
            return self.flush(step)
        if self.progress:
            self.progress.advance(step)
        return None

    def flush(self, step: int) -> dict[str, float]:
        """Writes what has been collected as one row and starts anew; for the last step, whatever its number."""
        row = self._row()
        self.write(step, row)
        self._sums, self._extremes = {}, {}
        self._steps, self._tokens, self._started = 0, 0, time.perf_counter()
        return row

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Appends one row as it is, as evaluations do, and shows it. NaN and infinity are written as null.

        Raises:
            OSError: the disk is full; metrics.jsonl keeps whole lines only.
        """
        with disk_errors(self.path):
            whole = self.path.stat().st_size
            try:
                self._file.write(json.dumps({"step": step, **_finite(row)}) + "\n")
                self._file.flush()
            except OSError:
                self._discard_after(whole)
                raise
        for tracker in self.trackers:
            tracker.log(step, dict(row))
        if self.progress:
            self.progress.show(step, row)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Writes summary.json, replacing an earlier one as a whole."""
        write_atomic(self.output_dir / "summary.json", json.dumps(_finite(values), indent=2) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """Every row on disk, those from before a resume included."""
        return read_metrics(self.output_dir)

    def state_dict(self) -> dict[str, Any]:
        """JSON: what has been collected since the last row, so that a resumed run writes the rows an unbroken one does."""
        return {
            "sums": {name: [float(total), float(count)] for name, (total, count) in self._sums.items()},
            "extremes": dict(self._extremes),
            "values": dict(self._values),
            "counts": [self._steps, self._tokens, self.num_tokens],
        }

    def resume(self, step: int, state: Mapping[str, Any]) -> None:
        """Goes on after `step` with what `state_dict` returned then: later rows on disk are removed."""
        kept = [row for row in read_metrics(self.output_dir) if row["step"] <= step]
        self._file.close()
        write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        self._sums = {name: (total, count) for name, (total, count) in state["sums"].items()}
        self._extremes, self._values = dict(state["extremes"]), dict(state["values"])
        self._steps, self._tokens, self.num_tokens = state["counts"]
        self._started = time.perf_counter()
        if self.progress:
            self.progress.advance(step)

    def close(self) -> None:
        """Closes the file, the bar and the trackers; a second call does nothing."""
        self._file.close()
        if self.progress:
            self.progress.close()
        for tracker in self.trackers:
            tracker.close()
        self.trackers = []

    def _row(self) -> dict[str, float]:
        steps, seconds = max(1, self._steps), time.perf_counter() - self._started
        row = dict(self._values)
        for name, (total, count) in self._sums.items():
            divisor = float(count) or (steps if name.startswith("timing_s/") else 0)
            row[name] = float(total) / divisor if divisor else math.nan
        row |= self._extremes
        row |= {"num_tokens": self.num_tokens, "tokens_per_second": self._tokens / seconds if seconds > 0 else 0.0}
        return row | {"step_time": seconds / steps, "peak_memory_mb": peak_memory_mb()}

    def _discard_after(self, size: int) -> None:
        """After a failed write: drops the unwritten rest and cuts the half-written line off."""
        with suppress(OSError):  # closing flushes, which fails again; the descriptor is closed all the same
            self._file.close()
        with open(self.path, "r+b") as file:
            file.truncate(size)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115


def read_metrics(output_dir: str | Path) -> list[dict[str, Any]]:
    """The rows of `output_dir/metrics.jsonl`; a last line cut short by a kill is passed over."""
    path = Path(output_dir) / "metrics.jsonl"
    if not path.exists():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.split("\n") if line]


def cut_partial_line(path: Path) -> None:
    """Removes a last line that a kill cut short, so that the next one does not continue it."""
    if path.exists():
        whole = path.read_bytes().rfind(b"\n") + 1
        if whole != path.stat().st_size:
            with open(path, "r+b") as file:
                file.truncate(whole)


def peak_memory_mb() -> float:
    """MiB: the most this process has held, on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _detached(value: Number) -> Number:
    return value.detach() if isinstance(value, Tensor) else value


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
