"""Puts a program to its tests, inside the sandbox, in the process that `enter.py` made for it.

Requests come on what was stdin, each its length, a space and a marshalled dictionary; replies go to what was stdout, each a line of JSON.

{"program": text, "packages": [folder], "imported": bool}: what to test, first. Imported: it is executed here at once, as a module
that is not __main__; the reply is {"ready": true}, or {"failed": true}.
{"value": expression, "fresh": bool}: its value, as `encode` writes it, in {"value": …}. No expectation ever comes in here.
{"run": statements, "fresh": bool}: followed by a token, framed likewise, which is read only when the statements have ended and is sent back
in {"token": …}: a program that ends the process early, or answers in this one's place, does not have it. `fresh` begins a new
test: its names do not see the last one's.
{"input": text, "output_bytes": n}: the program runs as __main__ in a process of its own; {"output": hex, "status": n}.
"""

from __future__ import annotations

import builtins
import fcntl
import marshal
import os
import select
import sys

TYPE_CHECKING = False  # typing takes longer to import than all of the above
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CodeType
    from typing import Any

_compile, _eval, _exec = compile, eval, exec  # a program may put others in their place
_DEEPEST = 50
_SIGKILL = 9
_SCALARS: dict[type, Callable[[Any], str]] = {
    bool: lambda v: "true" if v else "false",
    str: lambda v: _named("str", v.encode("utf-8", "surrogatepass").hex()),
    int: lambda v: _named("int", hex(v)),
    float: lambda v: _named("float", v.hex()),
    bytes: lambda v: _named("bytes", v.hex()),
    complex: lambda v: f'{{"complex": ["{v.real.hex()}", "{v.imag.hex()}"]}}',
}
_CONTAINERS = {list: "list", tuple: "tuple", set: "set", frozenset: "set"}


def encode(value: Any, depth: int = 0) -> str:
    """A value of Python's own types as JSON that names its type; of a subclass, as the type it extends.

    Raises:
        TypeError: for anything else.
    """
    if value is None:
        return "null"
    if not isinstance(value, (*_SCALARS, *_CONTAINERS, dict)) and hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()  # a number of numpy or torch
    for kind, write in _SCALARS.items():
        if isinstance(value, kind):
            return write(value if type(value) is kind else kind.__new__(kind, value))
    if depth < _DEEPEST:
        for kind, name in _CONTAINERS.items():
            if isinstance(value, kind):
                return f'{{"{name}": [{", ".join(encode(item, depth + 1) for item in kind.__iter__(value))}]}}'
        if isinstance(value, dict):
            pairs = (f"[{encode(k, depth + 1)}, {encode(v, depth + 1)}]" for k, v in dict.items(value))
            return f'{{"dict": [{", ".join(pairs)}]}}'
    raise TypeError(f"{type(value).__name__} is not compared")


def _named(name: str, text: str) -> str:
    return f'{{"{name}": "{text}"}}'


class Channel:
    """The two pipes, moved to descriptors that a program does not guess; read no further than a message."""

    def __init__(self) -> None:
        places = [30 + byte for byte in os.urandom(2)]
        self._requests, self._replies = (
            fcntl.fcntl(old, fcntl.F_DUPFD_CLOEXEC, new % 200) for old, new in zip((0, 1), places, strict=True)
        )
        empty = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(empty, standard)
        os.close(empty)

    def message(self) -> bytes:
        """The next message; nothing after it is taken from the pipe."""
        size = b""
        while (byte := os.read(self._requests, 1)) not in (b" ", b""):
            size += byte
        left, parts = int(size or 0), b""
        while len(parts) < left and (part := os.read(self._requests, left - len(parts))):
            parts += part
        return parts

    def request(self) -> dict[str, Any] | None:
        message = self.message()
        return marshal.loads(message) if message else None

    def reply(self, message: str) -> None:
        body = message.encode() + b"\n"
        while body:
            body = body[os.write(self._replies, body) :]


class Imported:
    """A program whose functions are called."""

    def __init__(self, code: CodeType) -> None:
        self._module = type(sys)("solution")
        # tests that import it find it, and so does what looks a class up by its module
        sys.modules["solution"] = sys.modules["__main__"] = self._module
        _exec(code, self._module.__dict__)
        self._scope: dict[str, Any] = {}

    def answer(self, request: dict[str, Any], channel: Channel) -> str:
        if request["fresh"]:
            self._scope = dict(self._module.__dict__)
        try:
            if "value" in request:
                return f'{{"value": {encode(_eval(_compile(request["value"], "<test>", "eval"), self._scope))}}}'
            _exec(_compile(request["run"], "<test>", "exec"), self._scope)
        except BaseException:  # SystemExit too
            if "run" in request:
                channel.message()
            return '{"failed": true}'
        return _named("token", channel.message().decode())


def _as_main(code: CodeType) -> int:
    main = type(sys)("__main__")
    sys.modules["__main__"] = main
    status = 0
    try:
        _exec(code, main.__dict__)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        status = 1
    try:
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()
        sys.stdout.flush()
    except BaseException:
        status = status or 1
    return status & 255


def run_whole(code: CodeType, text: str, most: int) -> str:
    """One run of the program with `text` as its stdin; nothing it started outlives it."""
    stdin, (out, theirs) = os.memfd_create("stdin"), os.pipe()
    with open(os.dup(stdin), "wb") as file:
        file.write(text.encode("utf-8", "surrogatepass"))
    os.lseek(stdin, 0, os.SEEK_SET)
    child = os.fork()
    if child == 0:
        os.setsid()
        os.dup2(stdin, 0)
        os.dup2(theirs, 1)
        os.closerange(3, 256)
        sys.stdin = os.fdopen(0, encoding="utf-8", errors="replace")
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="replace")
        os._exit(_as_main(code))
    os.close(theirs)
    os.close(stdin)
    output, ended = b"", os.pidfd_open(child)
    while len(output) <= most:
        ready = select.select([out, ended], [], [])[0]
        if out not in ready or not (part := os.read(out, 1 << 16)):
            break
        output += part
    if len(output) > most:
        os.kill(child, _SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:  # noqa: SIM105  (contextlib takes longer to import than the rest)
        os.kill(-1, _SIGKILL)  # in here that is everything but this process and the first
    except (ProcessLookupError, PermissionError):
        pass
    os.close(out)
    os.close(ended)
    return f'{{"output": "{output[:most].hex()}", "status": {status}}}'


def main() -> None:
    channel = Channel()
    setup = channel.request() or {}
    sys.path += setup["packages"]
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]
    sys.argv = ["solution.py"]
    try:
        code = _compile(setup["program"], "solution.py", "exec", dont_inherit=True)
        imported = Imported(code) if setup["imported"] else None
    except BaseException:
        channel.reply('{"failed": true}')
        return
    channel.reply('{"ready": true}')
    while (request := channel.request()) is not None:
        if imported is not None:
            channel.reply(imported.answer(request, channel))
        else:
            channel.reply(run_whole(code, request["input"], request["output_bytes"]))
