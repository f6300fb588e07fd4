"""Calls of environments, many at a time, each with a time limit: what one of them does costs only its own sample."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from ..rewards.worker import describe

MAX_THREADS = 32
MAX_HUNG = 32
"""Calls that may run past their limit; with more it is the environment that hangs, not the samples."""


@dataclass(frozen=True)
class Failure:
    """Why a call gave no result."""

    reason: str


@dataclass(frozen=True)
class _Call:
    key: Any
    function: Callable[..., Any]
    arguments: dict[str, Any]


class Calls:
    """Runs calls and gives their outcomes as they come.

    Each runs in a thread of its own. A thread cannot be killed: a call that runs past its limit is left behind, and its thread
    ends with the process at the latest.

    Args:
        limit: seconds a call may take.
        immediate: the calls end at once by themselves: they run in the caller's thread, in order, without a limit.
    """

    def __init__(self, limit: float, *, immediate: bool = False) -> None:
        self.limit, self.immediate = limit, immediate
        self.hung = 0
        self._waiting: deque[_Call] = deque()
        self._deadlines: dict[int, tuple[float, _Call]] = {}  # of the running calls, by number, oldest first
        self._done: SimpleQueue[tuple[int, Any]] = SimpleQueue()
        self._count = 0

    def __len__(self) -> int:
        """Calls whose outcome has not been taken."""
        return len(self._waiting) + len(self._deadlines)

    def submit(self, key: Any, function: Callable[..., Any], **arguments: Any) -> None:
        """Queues `function(**arguments)`; `key` comes back with its outcome."""
        self._waiting.append(_Call(key, function, arguments))

    def take(self, *, wait: bool) -> list[tuple[Any, Any]]:
        """(key, result or Failure) of the calls that have ended; with `wait` at least one, where there is any."""
        if self.immediate:
            calls, self._waiting = self._waiting, deque()
            return [(call.key, _outcome(call)) for call in calls]
        found: list[tuple[Any, Any]] = []
        while not found and len(self):
            found += self._start()
            found += self._ended(wait and not found)
            found += self._late()
            if not wait:
                break
        return found

    def _start(self) -> list[tuple[Any, Failure]]:
        """Starts what may start; the outcomes of what never will."""
        if self.hung >= MAX_HUNG:
            calls, self._waiting = self._waiting, deque()
            reason = f"not called: {self.hung} calls ran past {self.limit:g} s before it"
            return [(call.key, Failure(reason)) for call in calls]
        while self._waiting and len(self._deadlines) < MAX_THREADS:
            call, self._count = self._waiting.popleft(), self._count + 1
            self._deadlines[self._count] = time.monotonic() + self.limit, call
            threading.Thread(target=self._run, args=(self._count, call), daemon=True, name="fastalign-environment").start()
        return []

    def _run(self, number: int, call: _Call) -> None:
        self._done.put((number, _outcome(call)))

    def _ended(self, wait: bool) -> list[tuple[Any, Any]]:
        found: list[tuple[Any, Any]] = []
        try:
            while self._deadlines:
                number, outcome = self._done.get(block=wait and not found, timeout=self._left() if wait and not found else None)
                if number in self._deadlines:  # otherwise it was too late
                    found.append((self._deadlines.pop(number)[1].key, outcome))
        except Empty:
            pass
        return found

    def _left(self) -> float:
        """Seconds until the oldest running call is late."""
        return max(0.001, next(iter(self._deadlines.values()))[0] - time.monotonic())

    def _late(self) -> list[tuple[Any, Failure]]:
        now = time.monotonic()
        late = [number for number, (deadline, _) in self._deadlines.items() if deadline <= now]
        self.hung += len(late)
        reason = f"no answer within {self.limit:g} s (its thread goes on in the background)"
        return [(self._deadlines.pop(number)[1].key, Failure(reason)) for number in late]


def _outcome(call: _Call) -> Any:
    try:
        return call.function(**call.arguments)
    except BaseException as error:  # SystemExit, too, is the environment's own affair
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise
        return Failure(describe(error))
