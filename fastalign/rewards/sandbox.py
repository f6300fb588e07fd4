"""One sandbox seen from outside: starting it, its pipes, its clock, its end."""

from __future__ import annotations

import contextlib
import marshal
import os
import selectors
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from . import nursery

_START_SECONDS = 60.0  # building a sandbox takes a twentieth of a second; on a machine that swaps, much longer
_STOP_SECONDS = 10.0
_CHUNK = 1 << 16
_MIB = 1 << 20
_ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
}  # fmt: skip


class ConfinementUnavailable(ValueError):
    """No sandbox can be built here; the text says what is missing and what helps."""


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: of wall-clock time; a process also of processor time.
        memory_mb: MiB of address space of a process, and of private memory of all its processes together.
        disk_mb: MiB that its folder may hold.
        processes: processes and threads at a time.
        output_bytes: of stdout, and of stderr; a program that writes more is ended.
    """

    seconds: float = 10.0
    memory_mb: int = 1024
    disk_mb: int = 64
    processes: int = 32
    output_bytes: int = 1 << 20


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    Attributes:
        stdout: what it wrote, at most `Limits.output_bytes`; bytes that are not UTF-8 are replaced.
        stderr: likewise.
        returncode: its exit status; minus the signal that ended it; None where a limit of ours did.
        exceeded: the limit that ended it: "seconds", "memory", "disk" or "output"; empty where none did. An allocation that
            is refused is not among them: the program sees it and answers for itself.
        seconds: how long it ran.
    """

    stdout: str
    stderr: str
    returncode: int | None
    exceeded: str
    seconds: float

    @property
    def timed_out(self) -> bool:
        return self.exceeded == "seconds"


class Running:
    """A program in a sandbox. Use it as a context: its end ends every process of the sandbox.

    Args:
        command: the program, as an absolute path, and its arguments; empty: `jail/examine.py`.
        way: how the sandbox is built: "root" or "user" (namespaces), "uid" (a user of its own).
        files: written into its folder, which is also its current one, before it starts.
        readable: absolute files and folders that it may read.
        limits: what it may use.

    Raises:
        ConfinementUnavailable: the sandbox cannot be built; nothing was run.
    """

    def __init__(
        self, command: Sequence[str], way: str, *, files: Mapping[str, str] | None = None, readable: Sequence[str] = (),
        limits: Limits | None = None,
    ) -> None:  # fmt: skip
        self.limits = limits or Limits()
        self._began = self._deadline = self._ended = 0.0
        self._fate, self._exceeded = "", ""
        self._pid = 0
        self._waiting = bytearray()  # for its stdin
        self._folder = tempfile.mkdtemp(prefix="fastalign-sandbox-")
        self._output: dict[int, bytearray] = {}
        self._pipes: list[int] = []
        self._selector = selectors.DefaultSelector()
        try:
            self._start(_setup(command, way, self._folder, files or {}, readable, self.limits))
            self._pump(lambda: self._began > 0 or bool(self._fate), time.monotonic() + _START_SECONDS)
            if not self._began:
                raise ConfinementUnavailable(self._fate.removeprefix("error ") or f"the sandbox was not built within {_START_SECONDS:g} s")
        except BaseException:
            self.close()
            raise

    def _start(self, setup: dict[str, object]) -> None:
        control, stdin, stdout, stderr, status = pipes = [os.pipe() for _ in range(5)]
        self._pipes = [end for pipe in pipes for end in pipe]
        self._control, self._stdin = control[1], stdin[1]
        self._out, self._err, self._status = stdout[0], stderr[0], status[0]
        nursery.enter([control[0], stdin[0], stdout[1], stderr[1], status[1]])
        for file in (control[0], stdin[0], stdout[1], stderr[1], status[1]):
            self._close(file)
        for file in (self._out, self._err, self._status):
            self._output[file] = bytearray()
            os.set_blocking(file, False)
            self._selector.register(file, selectors.EVENT_READ)
        os.set_blocking(self._stdin, False)
        body = marshal.dumps(setup)
        message = memoryview(len(body).to_bytes(8, "little") + body)
        with contextlib.suppress(BrokenPipeError):  # the status tells
            while message:
                message = message[os.write(self._control, message) :]

    def _close(self, file: int) -> None:
        if file in self._pipes:
            self._pipes.remove(file)
            os.close(file)

    def send(self, text: bytes, last: bool = False) -> None:
        """Writes to its stdin, as fast as it reads; `last` closes it thereafter."""
        self._waiting += text
        if last:
            self._pump(lambda: not self._waiting or bool(self._fate), self._deadline)
            self._close_stdin()

    def receive_line(self) -> bytes | None:
        """The next line of its stdout, without its end; None when it ended, ran out of time, or wrote too much."""
        buffer = self._output[self._out]
        self._pump(lambda: b"\n" in buffer or self._out not in self._selector.get_map(), self._deadline)
        line, end, rest = bytes(buffer).partition(b"\n")
        if not end or self._exceeded:
            return None
        buffer[:] = rest
        return line

    @property
    def elapsed(self) -> float:
        """Seconds since the program started, or that it took."""
        return (self._ended or time.monotonic()) - self._began

    def finish(self) -> Outcome:
        """Waits for its end or for a limit, ends what is left of it, and says what became of it.

        Raises:
            ConfinementUnavailable: the program could not be started.
        """
        self._pump(lambda: set(self._selector.get_map()) <= {self._stdin}, self._deadline)
        texts = [bytes(self._output[file][: self.limits.output_bytes]).decode(errors="replace") for file in (self._out, self._err)]
        self.close()
        if self._fate.startswith("error "):
            raise ConfinementUnavailable(self._fate.removeprefix("error "))
        kind, _, number = self._fate.partition(" ")
        code = int(number) if kind == "exit" else -int(number) if kind == "signal" else None
        exceeded = self._exceeded or (kind if kind in ("memory", "disk") else "")
        return Outcome(texts[0], texts[1], None if exceeded else code, exceeded, self.elapsed)

    def _pump(self, done: Callable[[], bool], deadline: float) -> None:
        """Moves bytes until `done`, the deadline or too much output; the two last end the program."""
        while not done():
            if self._waiting and self._stdin not in self._selector.get_map() and self._stdin in self._pipes:
                self._selector.register(self._stdin, selectors.EVENT_WRITE)
            left = deadline - time.monotonic()
            ready = self._selector.select(left) if left > 0 else []
            if not ready and deadline <= time.monotonic():
                self._exceeded = self._exceeded or "seconds"
            for key, _ in ready:
                if key.fd == self._stdin:
                    self._write()
                else:
                    self._read(key.fd)
            if self._exceeded:
                self._stop()
                return
            deadline = self._deadline or deadline

    def _write(self) -> None:
        try:
            del self._waiting[: os.write(self._stdin, self._waiting[:_CHUNK])]
        except BlockingIOError:
            return
        except OSError:  # it closed its stdin, or ended
            self._waiting.clear()
        if not self._waiting:
            self._selector.unregister(self._stdin)

    def _read(self, file: int) -> None:
        try:
            part = os.read(file, _CHUNK)
        except BlockingIOError:
            return
        if not part:
            self._selector.unregister(file)
        self._output[file] += part
        if file == self._status:
            self._learn()
        elif len(self._output[file]) > self.limits.output_bytes:
            self._exceeded = "output"

    def _learn(self) -> None:
        for line in self._output[self._status].decode(errors="replace").splitlines():
            if line.startswith("pid "):
                self._pid = int(line.removeprefix("pid "))
            elif line == "started":
                self._began = self._began or time.monotonic()
                self._deadline = self._began + self.limits.seconds
            elif not self._fate:
                self._fate, self._ended = line, time.monotonic()
        if self._status not in self._selector.get_map() and not self._fate:
            self._fate, self._ended = "error its outer process died", time.monotonic()

    def _close_stdin(self) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(self._stdin)
        self._close(self._stdin)

    def _stop(self) -> None:
        """Asks for the end of everything, and waits for it: the status ends with the last process that holds it."""
        self._ended = self._ended or time.monotonic()
        with contextlib.suppress(OSError):
            os.write(self._control, b"x")  # a forked copy of this process may hold the pipe open
        self._close(self._control)
        deadline = time.monotonic() + _STOP_SECONDS
        while self._status in self._selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                if self._pid:  # takes process 1 of the sandbox along, and that one the rest
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(self._pid, signal.SIGKILL)
                return
            for file in {key.fd for key, _ in self._selector.select(left)} - {self._stdin}:
                self._discard(file)

    def _discard(self, file: int) -> None:
        with contextlib.suppress(BlockingIOError):
            if not os.read(file, _CHUNK) or file != self._status:
                self._selector.unregister(file)

    def close(self) -> None:
        """Ends the program, if it still runs, with all it started, and removes its folder."""
        if self._output:
            self._stop()
        for file in list(self._pipes):
            self._close(file)
        self._output = {}
        self._selector.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _setup(
    command: Sequence[str], way: str, folder: str, files: Mapping[str, str], readable: Sequence[str], limits: Limits
) -> dict[str, object]:
    work = folder if way == "uid" else "/sandbox"
    return {
        "command": list(command), "way": way, "folder": folder, "readable": list(readable),
        "environment": {**_ENVIRONMENT, "HOME": work, "TMPDIR": work},
        "files": {name: text.encode("utf-8", "surrogatepass") for name, text in files.items()},
        "cpu_seconds": int(limits.seconds) + 2, "memory_bytes": limits.memory_mb * _MIB, "disk_bytes": limits.disk_mb * _MIB,
        "processes": limits.processes,
    }  # fmt: skip
