"""Peers taking turns: each side lives in a process of its own and works one step when it is told to.

A process a side keeps peak memory apart; turns (A B A B …) let slow drifts of the machine fall on both. The side that waits
is blocked in a pipe and uses no core.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from .machine import synchronize


class Gate:
    """A side's end of the pipe."""

    def __init__(self, connection: Connection):
        self.connection = connection
        self.began = self.began_cpu = 0.0

    def ready(self, **values: Any) -> None:
        """Says that the side is loaded."""
        self.connection.send(values)

    def wait(self) -> dict[str, Any]:
        """Blocks until it is this side's turn; returns what the referee handed over and starts the clock."""
        message = self.connection.recv()
        self.began, self.began_cpu = time.perf_counter(), time.process_time()
        return message

    def elapsed(self) -> dict[str, float]:
        """Since the turn began: wall seconds, and those of all cores that this process was given (a busy machine adds little to them)."""
        synchronize()
        return {"seconds": time.perf_counter() - self.began, "cpu_seconds": time.process_time() - self.began_cpu}

    def report(self, **values: Any) -> None:
        """Ends the turn."""
        self.connection.send(values)


Side = Callable[[Gate, dict[str, Any]], None]


def _play(side: Side, connection: Connection, options: dict[str, Any]) -> None:
    try:
        side(Gate(connection), options)
    except BaseException:
        connection.send({"error": traceback.format_exc()})
        raise SystemExit(1) from None


class Peer:
    """The referee's end: one side, loaded in a spawned process.

    Raises:
        RuntimeError: the side failed; its traceback is in the message.
    """

    def __init__(self, name: str, side: Side, options: dict[str, Any]):
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_play, args=(side, theirs, options), name=name)
        self.process.start()
        theirs.close()
        self.facts = self._receive()

    def turn(self, **values: Any) -> dict[str, Any]:
        """One step of this side."""
        self.connection.send(values)
        return self._receive()

    def close(self) -> None:
        """Waits for the side to finish; stops it when it does not."""
        self.connection.close()
        self.process.join(timeout=60)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join()

    def _receive(self) -> dict[str, Any]:
        try:
            message = self.connection.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(f"{self.name}: the process ended with status {self.process.exitcode} and no word; out of memory?") from None
        if "error" in message:
            raise RuntimeError(f"{self.name} failed:\n{message['error']}")
        return message


def quiet_environment(threads: int) -> None:
    """What spawned sides inherit: no network, no chatter, the same number of compute threads on both sides (0: torch's choice)."""
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRANSFORMERS_VERBOSITY="error")
    os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", PYTHONWARNINGS="ignore::FutureWarning")
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)


def alternate(peers: list[Peer], steps: int) -> dict[str, list[dict[str, Any]]]:
    """A B A B …, `steps` turns each, in the order given."""
    turns: dict[str, list[dict[str, Any]]] = {peer.name: [] for peer in peers}
    for index in range(steps):
        for peer in peers:
            turns[peer.name].append(peer.turn())
            print(f"  step {index + 1}/{steps}  {peer.name:10s} {turns[peer.name][-1]['seconds']:8.2f} s", flush=True)
    return turns


def median(turns: list[dict[str, Any]], key: str) -> float:
    """The median of one measured number over a side's steps."""
    return statistics.median(turn[key] for turn in turns)


@dataclass(frozen=True)
class Row:
    """A line of the table: one number a side, the peer's first; `better` says which way is up ("lower", "higher" or "")."""

    label: str
    values: list[float]
    better: str = "lower"

    @property
    def ratio(self) -> float | None:
        """How many times better the last side is than the first; None where that has no meaning."""
        peer, own = self.values[0], self.values[-1]
        if not self.better or peer <= 0 or own <= 0:
            return None
        return peer / own if self.better == "lower" else own / peer


def table(rows: list[Row], names: list[str]) -> str:
    """The rows as text, with the ratio in favour of the last side."""
    lines = [f"{'':34s}" + "".join(f"{name:>14s}" for name in names) + f"{'ratio':>10s}"]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
        lines.append(f"{row.label:34s}" + "".join(f"{value:14.2f}" for value in row.values) + f"{ratio:>10s}")
    return "\n".join(lines)
