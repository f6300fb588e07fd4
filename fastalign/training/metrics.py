"""Metrics: sums over micro-batches in, one JSON object a logging step out.

The keys are TRL's. A mean is kept as (sum, count) until a row is written, so it does not depend on how the batch was
cut into micro-batches; tensors are summed where they are and read once a row, so a GPU is not waited for in between.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from .files import disk_errors, write_atomic
from .progress import Progress
from .trackers import open_trackers

Number = float | int | Tensor


class Metrics:
    """Collects the numbers of a run and writes them to `output_dir`.

    Args:
        output_dir: gets metrics.jsonl, config.yaml and summary.json.
        report_to: trackers, comma-separated, or "none".
        run_name: the run's name in the trackers; empty: the last part of output_dir.
        config: the resolved configuration; written as config.yaml unless empty.
        total_steps: the length of the progress bar; 0: unknown.
        logging_steps: optimizer steps a row.
        progress: show a bar on a terminal, or one line a row elsewhere.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        report_to: str = "none",
        run_name: str = "",
        config: dict[str, Any] | None = None,
        total_steps: int = 0,
        logging_steps: int = 1,
        progress: bool = True,
    ) -> None:
        if logging_steps < 1:
            raise ValueError(f"--logging_steps must be >= 1, got {logging_steps}")
        self.output_dir = Path(output_dir)
        self.path = self.output_dir / "metrics.jsonl"
        with disk_errors(self.output_dir):
            self.output_dir.mkdir(parents=True, exist_ok=True)
        if config:
            write_atomic(self.output_dir / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        self.trackers = open_trackers(report_to, self.output_dir, run_name or self.output_dir.resolve().name, config or {})
        self.progress = Progress(total_steps) if progress else None
        self.logging_steps = logging_steps
        self.num_tokens = 0
        self._sums: dict[str, list[Number]] = {}
        self._extremes: dict[str, Number] = {}
        self._values: dict[str, float] = {}
        self._steps, self._tokens, self._started = 0, 0, time.perf_counter()
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (open for the length of the run)

    def add(self, name: str, total: Number, count: Number = 1) -> None:
        """Adds to the mean of `name`: `total` is a sum over `count` items. A tensor is detached and not waited for."""
        entry = self._sums.setdefault(name, [0.0, 0.0])
        entry[0] = entry[0] + _detached(total)
        entry[1] = entry[1] + _detached(count)

    def lowest(self, name: str, value: Number) -> None:
        """Keeps the smallest value since the last row."""
        known = self._extremes.get(name)
        self._extremes[name] = _number(value) if known is None else min(_number(known), _number(value))

    def highest(self, name: str, value: Number) -> None:
        """Keeps the largest value since the last row."""
        known = self._extremes.get(name)
        self._extremes[name] = _number(value) if known is None else max(_number(known), _number(value))

    def put(self, **values: float) -> None:
        """Sets values of which the last one counts: learning_rate, epoch."""
        self._values.update(values)

    def count_tokens(self, count: int) -> None:
        """Counts trained tokens for num_tokens and tokens_per_second."""
        self._tokens += count
        self.num_tokens += count

    @contextmanager
    def timer(self, phase: str) -> Iterator[None]:
        """Adds the block's wall time to `timing_s/{phase}`: seconds a step (on a GPU: until its kernels are queued)."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._sums.setdefault(f"timing_s/{phase}", [0.0, 0.0])[0] += time.perf_counter() - start

    def end_step(self, step: int) -> dict[str, float] | None:
        """Ends optimizer step `step` (counted from 1). Returns the row when this step is a logging step, else None."""
        self._steps += 1
        if step % self.logging_steps:
            if self.progress:
                self.progress.advance(step)
            return None
        return self.flush(step)

    def flush(self, step: int) -> dict[str, float]:
        """Writes what has been collected as one row, and starts anew. For the last step, whatever its number."""
        row = self._row()
        self.write(step, row)
        if self.progress:
            self.progress.show(step, row)
        self._sums, self._extremes = {}, {}
        self._steps, self._tokens, self._started = 0, 0, time.perf_counter()
        return row

    def write(self, step: int, row: dict[str, float]) -> None:
        """Appends one row as it is, as evaluations do. NaN and infinity are written as null.

        Raises:
            OSError: the disk is full; metrics.jsonl keeps whole lines only.
        """
        line = json.dumps({"step": step, **{name: value if math.isfinite(value) else None for name, value in row.items()}})
        with disk_errors(self.path):
            start = self.path.stat().st_size if self.path.exists() else 0
            try:
                self._file.write(line + "\n")
                self._file.flush()
            except OSError:
                self._discard_buffer(start)
                raise
        for tracker in self.trackers:
            tracker.log(step, row)

    def summary(self, values: dict[str, Any]) -> None:
        """Writes summary.json, replacing an earlier one as a whole."""
        write_atomic(self.output_dir / "summary.json", json.dumps(_finite(values), indent=2) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """Every row on disk, resumed ones included."""
        return read_metrics(self.output_dir)

    def state_dict(self) -> dict[str, Any]:
        """JSON: what has been collected since the last row, so that a resumed run writes the same rows."""
        sums = {name: [_number(total), _number(count)] for name, (total, count) in self._sums.items()}
        extremes = {name: _number(value) for name, value in self._extremes.items()}
        return {"num_tokens": self.num_tokens, "sums": sums, "extremes": extremes, "steps": self._steps, "tokens": self._tokens}

    def resume(self, step: int, state: dict[str, Any]) -> None:
        """Goes on after `step` with what `state_dict` returned then: later rows on disk are removed."""
        kept = [row for row in read_metrics(self.output_dir) if row["step"] <= step]
        self._file.close()
        write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        self.num_tokens, self._steps, self._tokens = state["num_tokens"], state["steps"], state["tokens"]
        self._sums = {name: list(pair) for name, pair in state["sums"].items()}
        self._extremes = dict(state["extremes"])
        self._started = time.perf_counter()
        if self.progress:
            self.progress.advance(step)

    def close(self) -> None:
        """Closes the file, the bar and the trackers. Called twice, it does nothing the second time."""
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
            divisor = float(steps) if name.startswith("timing_s/") else _number(count)
            row[name] = _number(total) / divisor if divisor else math.nan
        row.update({name: _number(value) for name, value in self._extremes.items()})
        row["num_tokens"] = self.num_tokens
        row["tokens_per_second"] = self._tokens / seconds if seconds > 0 else 0.0
        row["step_time"] = seconds / steps
        row["peak_memory_mb"] = peak_memory_mb()
        return row

    def _discard_buffer(self, size: int) -> None:
        """After a failed write: drops the unwritten rest and cuts the half-written line off."""
        try:
            self._file.close()
        except OSError:
            pass  # closing flushes, which fails again; the descriptor is closed all the same
        self._file = open(self.path, "r+", encoding="utf-8")  # noqa: SIM115
        self._file.truncate(size)
        self._file.seek(0, 2)


def read_metrics(output_dir: str | Path) -> list[dict[str, Any]]:
    """The rows of `output_dir/metrics.jsonl`; a last line cut short by a kill is passed over."""
    path = Path(output_dir) / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def peak_memory_mb() -> float:
    """MiB: the most this process has held, on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _detached(value: Number) -> Number:
    return value.detach() if isinstance(value, Tensor) else value


def _number(value: Number) -> float:
    return float(value)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
