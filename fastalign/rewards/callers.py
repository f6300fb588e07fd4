"""Where a reward function runs: in this process, in a thread of it, or in worker processes that can be killed."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import selectors
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from queue import LifoQueue
from typing import Any, Protocol

from . import worker

Values = list[float | dict[str, str] | None]

START_SECONDS = 180.0
"""How long a worker may take to import its function; a function may load a model while it is imported."""


class CallFailed(Exception):
    """A call gave no usable list. `hung`: it ran past its limit. `of_all`: no sample of its alone is the cause."""

    def __init__(self, reason: str, hung: bool = False, of_all: bool = False) -> None:
        super().__init__(reason)
        self.hung, self.of_all = hung, of_all

    @classmethod
    def by(cls, error: BaseException) -> CallFailed:
        """The failure that an exception of the function is."""
        of_all = isinstance(error, worker.NotOneEach)
        return cls(str(error) if of_all else worker.describe(error), of_all=of_all)


class _Died(CallFailed):
    """The worker process ended before it answered."""


class LoadFailed(Exception):
    """The function could not be loaded; `names` are the functions that its module has."""

    def __init__(self, reason: str, names: list[str]) -> None:
        super().__init__(reason)
        self.names = names


class Caller(Protocol):
    """One reward function, wherever it runs."""

    shards: int

    def signature(self) -> dict[str, Any]:
        """Its parameters, as `worker.signature` gives them."""

    def call(self, arguments: dict[str, Any], count: int, limit: float) -> Values:
        """One call with at most `limit` seconds. Raises CallFailed."""

    def close(self) -> None:
        """Ends what the caller started."""


class InProcess:
    """Calls the function directly: for our own rewards that cannot hang. The limit is not enforced."""

    shards = 1

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def signature(self) -> dict[str, Any]:
        return worker.signature(self.function)

    def call(self, arguments: dict[str, Any], count: int, limit: float) -> Values:
        try:
            return worker.evaluate(self.function, arguments, count)
        except Exception as error:
            raise CallFailed.by(error) from error

    def close(self) -> None:
        pass


class InThread(InProcess):
    """Calls the function in a thread: for closures, lambdas and functions of __main__, which no other process can load.

    A thread cannot be killed: one that runs past its limit is left behind, and ends with the process.
    """

    def call(self, arguments: dict[str, Any], count: int, limit: float) -> Values:
        outcome: list[Values | BaseException] = []

        def target() -> None:
            try:
                outcome.append(worker.evaluate(self.function, arguments, count))
            except BaseException as error:  # SystemExit would end the thread without a word
                outcome.append(error)

        thread = threading.Thread(target=target, daemon=True, name="fastalign-reward")
        thread.start()
        thread.join(limit)
        if not outcome:
            raise CallFailed(f"no answer within {limit:g} s (its thread goes on in the background)", hung=True)
        if isinstance(outcome[0], BaseException):
            raise CallFailed.by(outcome[0]) from outcome[0]
        return outcome[0]


class InWorkers:
    """Calls the function in persistent worker processes, started afresh (never forked) and killed when they hang.

    Args:
        target: what `worker.load` loads.
        shards: how many processes share a batch; more than one only for functions that score each sample on its own.
        preload: modules to import at the start where they are installed, so that no call pays for it.
        known: the function's signature where this process knows it, so that nothing waits for the workers to start.
    """

    def __init__(
        self, target: tuple[Any, ...], shards: int = 1, preload: tuple[str, ...] = (), known: dict[str, Any] | None = None
    ) -> None:
        self.shards = shards
        self._known = known
        self._workers = [_Worker(target, preload) for _ in range(shards)]
        self._idle: LifoQueue[_Worker] = LifoQueue()
        for process in self._workers:
            self._idle.put(process)

    def signature(self) -> dict[str, Any]:
        """Waits until the function is loaded, unless its signature is known. Raises LoadFailed."""
        return self._known or self._workers[0].ready()

    def call(self, arguments: dict[str, Any], count: int, limit: float) -> Values:
        process = self._idle.get()
        try:
            return process.call(arguments, count, limit)
        finally:
            self._idle.put(process)

    def close(self) -> None:
        for process in self._workers:
            process.close()


class _Worker:
    """One process, its pipes, and its restart after a death."""

    def __init__(self, target: tuple[Any, ...], preload: tuple[str, ...]) -> None:
        self._setup = {"path": list(sys.path), "target": target, "preload": preload, "parent": os.getpid()}
        self._closed = False
        self._signature: dict[str, Any] | None = None
        self._reading = threading.Lock()  # whoever holds it uses the pipes
        self._start()

    def _start(self) -> None:
        # -P: the script's own folder stays off sys.path. A session of its own: a hung worker is killed with its children
        command = [sys.executable, "-P", "-u", worker.__file__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        self._kill = weakref.finalize(self, _kill, self._process)  # also at interpreter exit
        self._loaded = False
        self._send(self._setup)

    def ready(self) -> dict[str, Any]:
        """The function's signature, once it is loaded. Raises LoadFailed."""
        with self._reading:
            return self._ready()

    def _ready(self) -> dict[str, Any]:
        if self._loaded and self._signature is not None:
            return self._signature
        try:
            reply = self._receive(START_SECONDS)
        except CallFailed as error:
            raise LoadFailed(str(error), []) from error
        if "error" in reply:
            raise LoadFailed(reply["error"], reply["names"])
        self._loaded, self._signature = True, reply["signature"]
        return reply["signature"]

    def call(self, arguments: dict[str, Any], count: int, limit: float) -> Values:
        with self._reading:
            try:
                if self._closed:
                    raise CallFailed("the rewards are closed")
                if self._process.poll() is not None:
                    self._restart()
                request = {"arguments": arguments, "count": count, "limit": limit}
                try:
                    self._hand_over(request, limit)
                except _Died:  # while it was idle, too late for `poll` to see: the samples have nothing to do with it
                    self._restart()
                    self._hand_over(request, limit)
                reply = self._receive(limit)
            except CallFailed:
                self._restart()
                raise
            except LoadFailed as error:
                self._restart()
                raise CallFailed(f"its function could not be loaded again: {error}") from error
            except BaseException:  # an interrupt: a reply that comes later must not answer the next call
                self._kill()
                raise
        if "error" in reply:
            raise CallFailed(reply["error"], of_all=reply.get("of_all", False))
        return reply["values"]

    def _hand_over(self, request: dict[str, Any], limit: float) -> None:
        self._ready()
        self._send(request)
        self._receive(limit)

    def _restart(self) -> None:
        self._kill()
        self._close_pipes()
        if not self._closed:
            self._start()

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            raise CallFailed(f"its arguments cannot be sent to another process: {error}") from error
        with contextlib.suppress(BrokenPipeError):  # the reply's end of file tells how it died
            self._process.stdin.write(struct.pack("<Q", len(body)) + body)
            self._process.stdin.flush()

    def _receive(self, limit: float) -> dict[str, Any]:
        deadline = time.monotonic() + limit
        (size,) = struct.unpack("<Q", self._read(8, deadline, limit))
        return json.loads(self._read(size, deadline, limit))

    def _read(self, size: int, deadline: float, limit: float) -> bytes:
        assert self._process.stdout is not None
        file, parts = self._process.stdout.fileno(), b""
        with selectors.DefaultSelector() as selector:
            selector.register(file, selectors.EVENT_READ)
            while len(parts) < size:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise CallFailed(f"no answer within {limit:g} s", hung=True)
                part = os.read(file, size - len(parts))
                if not part:
                    raise _Died(f"its process died with exit code {self._process.wait()}")
                parts += part
        return parts

    def close(self) -> None:
        self._closed = True
        self._kill()
        with self._reading:  # a call in another thread ends at once, its worker being dead
            self._close_pipes()

    def _close_pipes(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
