"""Metrics: one dict a step in, one JSON object a logging step out, under TRL's keys.

A row covers every step since the row before: means, except where the name says otherwise (`reduction`). Tensors are
kept where they are and read once a row, so a GPU is not waited for in between.
"""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from .files import disk_errors, write_atomic
from .progress import Progress
from .trackers import open_trackers

Values = Mapping[str, float | int | Tensor]
_LAST = ("learning_rate", "epoch", "num_tokens", "peak_memory_mb")


class Metrics:
    """Writes the numbers of a run to `output_dir` and to trackers.

    Args:
        output_dir: gets metrics.jsonl, config.yaml and summary.json.
        report_to: trackers, comma-separated, or "none".
        run_name: the run's name in the trackers; empty: the last part of output_dir.
        config: the resolved configuration; written as config.yaml unless empty.
        total_steps: the length of the progress bar; 0: unknown.
        progress: show a bar on a terminal, or one line a row elsewhere.

    Raises:
        ValueError: an unknown tracker, or one whose package is not installed.
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
        progress: bool = True,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.path = self.output_dir / "metrics.jsonl"
        with disk_errors(self.output_dir):
            self.output_dir.mkdir(parents=True, exist_ok=True)
        if config:
            write_atomic(self.output_dir / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
        name = run_name or self.output_dir.resolve().name
        self.trackers = open_trackers(report_to, self.output_dir, name, dict(config or {}))
        self.progress = Progress(total_steps) if progress else None
        self._window: dict[str, list[float | int | Tensor]] = {}
        cut_partial_line(self.path)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (open for the length of the run)

    def update(self, step: int, values: Values, *, log: bool = True) -> dict[str, float] | None:
        """Takes what optimizer step `step` (counted from 1) measured; with `log`, writes a row and returns it."""
        for name, value in values.items():
            self._window.setdefault(name, []).append(value.detach() if isinstance(value, Tensor) else value)
        if not log:
            if self.progress:
                self.progress.advance(step)
            return None
        row = _reduced(self._window)
        row.setdefault("peak_memory_mb", peak_memory_mb())
        self._window = {}
        self.write(step, row)
        if self.progress:
            self.progress.show(step, row)
        return row

    def evaluation(self, step: int, values: Values) -> None:
        """Writes held-out metrics as a row of their own."""
        row = {name: float(value) for name, value in values.items()}
        self.write(step, row)
        if self.progress:
            self.progress.show_evaluation(step, row)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Appends one row as it is. NaN and infinity are written as null.

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

    def summary(self, values: Mapping[str, Any]) -> None:
        """Writes summary.json, replacing an earlier one as a whole."""
        write_atomic(self.output_dir / "summary.json", json.dumps(_finite(values), indent=2) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """Every row on disk, those from before a resume included."""
        return read_metrics(self.output_dir)

    def state_dict(self) -> dict[str, Any]:
        """JSON: the steps since the last row, so that a resumed run writes the very rows an unbroken one does."""
        return {"window": {name: [float(value) for value in values] for name, values in self._window.items()}}

    def resume(self, step: int, state: Mapping[str, Any] | None = None) -> None:
        """Goes on after `step` with what `state_dict` returned then: later rows on disk are removed."""
        kept = [row for row in read_metrics(self.output_dir) if row["step"] <= step]
        self._file.close()
        write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        self._window = {name: list(values) for name, values in (state or {}).get("window", {}).items()}
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


def reduction(name: str) -> Callable[[list[float]], float]:
    """How the steps of a row become one number: the last, the lowest, the highest, the sum, or the mean."""
    key = name.rpartition("/")[2]
    if name in _LAST:
        return lambda values: values[-1]
    if key.startswith("min"):
        return min
    if key.startswith("max"):
        return max
    if key.startswith(("skipped", "num_", "missing")):
        return math.fsum
    return lambda values: math.fsum(values) / len(values)


def peak_memory_mb() -> float:
    """MiB: the most this process has held, on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _reduced(window: Mapping[str, list[float | int | Tensor]]) -> dict[str, float]:
    columns = {name: [float(value) for value in values] for name, values in window.items()}
    row = {}
    for name, values in columns.items():
        known = [value for value in values if not math.isnan(value)]  # a step without rewards leaves the others' mean
        row[name] = reduction(name)(known) if known else math.nan
    rates, times = columns.get("tokens_per_second", []), columns.get("step_time", [])
    if rates and len(rates) == len(times) and sum(times) > 0:  # tokens over seconds, not a mean of rates
        row["tokens_per_second"] = math.fsum(r * t for r, t in zip(rates, times, strict=True)) / math.fsum(times)
    return row


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
