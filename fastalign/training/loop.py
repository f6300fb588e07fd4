"""The loop: step, log, evaluate, save, stop when asked. It knows nothing of what a step does."""

from __future__ import annotations

import math
import operator
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from .interrupt import Interrupt
from .metrics import Metrics


class Task(Protocol):
    """What the loop drives."""

    def step(self, index: int) -> dict[str, float]:
        """One optimizer step (index from 0) and its metrics; `num_tokens` are those of this step."""

    def evaluate(self) -> dict[str, float]:
        """Held-out metrics, keys starting with eval/; empty when there is no held-out data."""


@dataclass(frozen=True)
class StopAt:
    """A held-out metric, a comparison and a value: eval/loss<0.5, eval/reward>=0.9."""

    metric: str
    comparison: str
    value: float

    @classmethod
    def parse(cls, text: str) -> StopAt | None:
        """Reads the flag; an empty text is None.

        Raises:
            ValueError: the text is not metric, comparison, number.
        """
        if not text:
            return None
        match = re.fullmatch(r"\s*(eval/[^\s<>=]+)\s*(<=|>=|<|>)\s*([-+.\deE]+)\s*", text)
        if match is None or not _is_number(match[3]):
            raise ValueError(f"--stop_at: expected a held-out metric, one of < <= > >=, and a number, as in eval/loss<0.5; got {text!r}")
        return cls(match[1], match[2], float(match[3]))

    def holds(self, values: dict[str, float]) -> bool:
        """Whether the run has got there.

        Raises:
            ValueError: the evaluation has no such metric.
        """
        if self.metric not in values:
            raise ValueError(
                f"--stop_at: no metric {self.metric!r} in the held-out evaluation, which has {', '.join(sorted(values)) or 'nothing'}"
            )
        return COMPARISONS[self.comparison](values[self.metric], self.value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


COMPARISONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


@dataclass(frozen=True)
class Cadence:
    """How often things happen, in optimizer steps; 0: never in between.

    Attributes:
        max_steps: where the run ends.
        save_steps, eval_steps: periods.
        stop_at: ends the run at the first held-out evaluation for which it holds.
    """

    max_steps: int
    save_steps: int = 0
    eval_steps: int = 0
    stop_at: StopAt | None = None


def run(
    task: Task,
    cadence: Cadence,
    metrics: Metrics,
    interrupt: Interrupt,
    *,
    start: int = 0,
    save: Callable[[int], Any],
) -> bool:
    """Drives `task` from step `start` to the end; returns False when it was interrupted (a checkpoint was saved).

    Held-out evaluation runs before the first step, after the last and every `eval_steps`. An exception that is no
    interrupt leaves the last checkpoint in place and goes on up.
    """
    if start == 0:
        values = evaluate(task, metrics, 0)
        if cadence.stop_at is not None:
            cadence.stop_at.holds(values)  # a metric that is not there is told before anything is trained
    for index in range(start, cadence.max_steps):
        record(metrics, task.step(index))
        done = index + 1
        last = done == cadence.max_steps
        row = metrics.end_step(done)
        if last and row is None:
            metrics.flush(done)
        if last or (cadence.eval_steps and done % cadence.eval_steps == 0):
            values = evaluate(task, metrics, done)
            if cadence.stop_at is not None and cadence.stop_at.holds(values):
                if row is None and not last:
                    metrics.flush(done)
                return True
        if interrupt.requested and not last:
            save(done)
            return False
        if cadence.save_steps and done % cadence.save_steps == 0:
            save(done)
    return True


def record(metrics: Metrics, values: dict[str, float]) -> None:
    """Adds one step's numbers: extremes stay extremes, the learning rate and epoch are the last ones, the rest are means."""
    metrics.count_tokens(int(values.pop("num_tokens")))
    for name, value in values.items():
        if math.isnan(value):
            continue
        if name in ("learning_rate", "epoch"):
            metrics.put(**{name: value})
        elif name.endswith(("/max", "/max_length")):
            metrics.highest(name, value)
        elif name.endswith("/min_length"):
            metrics.lowest(name, value)
        else:
            metrics.add(name, value)


def evaluate(task: Task, metrics: Metrics, step: int) -> dict[str, float]:
    """Evaluates, logs a row of its own when there is held-out data, and returns it; its time is not the next step's."""
    with metrics.paused():
        began = time.perf_counter()
        values = task.evaluate()
        if values:
            metrics.write(step, values | {"timing_s/eval": time.perf_counter() - began})
    return values
