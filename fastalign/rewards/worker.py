"""A reward function in a process of its own. This file runs as a script and imports the standard library alone.

Requests come on the original stdin as an 8-byte length and a pickle, from the process that started this one; replies go to
the original stdout as an 8-byte length and JSON, so that nothing a user's function returns is ever unpickled. A call is
answered twice: that it was received, then its result. Before the function is loaded both descriptors are replaced: what it
prints goes to stderr, what it reads from stdin is empty.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import importlib
import importlib.util
import inspect
import json
import math
import numbers
import os
import pickle
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

_PARENT_POLL_SECONDS = 2.0


class NotOneEach(ValueError):
    """A function did not return one value a completion: its own mistake, whichever samples it was given."""


def number(value: Any) -> float | dict[str, str] | None:
    """A reward as JSON: a finite float, None when missing (None, NaN), or {"bad": what is wrong with it}."""
    if value is None:
        return None
    if not isinstance(value, numbers.Real) and getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()  # a 0-d tensor or array
    if not isinstance(value, numbers.Real):
        return {"bad": f"expected a number or None, got {type(value).__name__} {str(value)[:80]!r}"}
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if abs(result) > 3e38:  # infinite, or infinite once it is fp32
        return {"bad": f"expected a finite number or None, got {value if isinstance(value, float) else 'a number over the float range'}"}
    return None if math.isnan(result) else result


def evaluate(
    function: Callable[..., Any], arguments: dict[str, Any], count: int, run: Callable[..., Any] = asyncio.run
) -> list[float | dict[str, str] | None]:
    """Calls a reward function, sync or async, and checks what it returns.

    Raises:
        NotOneEach: not a list, or one of the wrong length. Whatever the function raises.
    """
    result = function(**arguments)
    if inspect.isawaitable(result):
        result = run(_awaited(result))
    if hasattr(result, "tolist"):
        result = result.tolist()
    if not isinstance(result, list | tuple):
        raise NotOneEach(f"expected a list of {count} numbers, got {type(result).__name__}")
    if len(result) != count:
        raise NotOneEach(f"expected one number a completion, {count}, got {len(result)}")
    return [number(value) for value in result]


async def _awaited(awaitable: Any) -> Any:
    return await awaitable


def signature(function: Callable[..., Any]) -> dict[str, Any]:
    """The function's parameters: their names, those without a default, and whether it takes any keyword; and whether it says
    (`function.per_sample = True`) that a sample's reward depends on that sample alone."""
    alone = getattr(function, "per_sample", False) is True
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a built-in that does not say
        return {"names": [], "required": [], "any": True, "per_sample": alone}
    keyword = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return {
        "names": [p.name for p in keyword],
        "required": [p.name for p in keyword if p.default is p.empty],
        "any": any(p.kind is p.VAR_KEYWORD for p in parameters),
        "per_sample": alone,
    }


def load(target: tuple[str, ...]) -> Callable[..., Any]:
    """The function of ("module", name, attribute), ("file", path, attribute) or ("pickle", bytes).

    Raises:
        AttributeError: with the callables that there are. ImportError, OSError and whatever the module raises.
    """
    if target[0] == "pickle":
        return pickle.loads(target[1])  # type: ignore[arg-type]
    kind, place, attribute = target
    module = _load_file(place) if kind == "file" else importlib.import_module(place)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
            raise AttributeError(f"{place} has no function {attribute!r}", names)
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"{attribute!r} of {place} is a {type(found).__name__}, expected a function")
    return found


def _load_file(path: str) -> Any:
    sys.path.insert(0, str(Path(path).resolve().parent))  # its neighbours import as they do when it runs as a script
    stem = Path(path).stem
    name = f"reward_file_{stem}" if stem in sys.modules else stem  # a json.py of the user must not replace the real one
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def read_message(stream: BinaryIO) -> Any:
    """The next request; None at the end of the stream."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    return pickle.loads(stream.read(struct.unpack("<Q", head)[0]))


def write_message(stream: BinaryIO, message: dict[str, Any]) -> None:
    body = json.dumps(message).encode()
    stream.write(struct.pack("<Q", len(body)) + body)
    stream.flush()


def describe(error: BaseException) -> str:
    """An exception in one line: its type, its text, and the line of code it came from."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f" ({trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})" if trace is not None else ""
    return f"{type(error).__name__}: {error}"[:500] + place


def _die_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_PARENT_POLL_SECONDS)
    os._exit(1)


def _start(requests: BinaryIO, replies: BinaryIO) -> Callable[..., Any] | None:
    setup = read_message(requests)
    if setup is None:
        return None
    sys.path[:] = setup["path"]
    for module in setup["preload"]:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    threading.Thread(target=_die_with, args=(setup["parent"],), daemon=True).start()
    try:
        function = load(setup["target"])
    except BaseException as error:
        names = error.args[1] if isinstance(error, AttributeError) and len(error.args) > 1 else []
        text = str(error.args[0]) if names else describe(error)
        write_message(replies, {"error": text, "names": names})
        return None
    write_message(replies, {"signature": signature(function)})
    return function


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Loads the function and answers calls until the stream ends."""
    function = _start(requests, replies)
    loop = asyncio.new_event_loop()  # one loop for all calls: a client that an async function keeps is bound to it
    asyncio.set_event_loop(loop)
    while function is not None and (request := read_message(requests)) is not None:
        # the parent kills a late worker; this ends one whose parent died first, even when C code never releases the GIL
        faulthandler.dump_traceback_later(request["limit"] + 5.0, exit=True)
        write_message(replies, {"received": True})
        try:
            values = evaluate(function, request["arguments"], request["count"], loop.run_until_complete)
            reply: dict[str, Any] = {"values": values}
        except BaseException as error:  # SystemExit too: the worker must answer
            of_all = isinstance(error, NotOneEach)
            reply = {"error": str(error) if of_all else describe(error), "of_all": of_all}
        faulthandler.cancel_dump_traceback_later()
        write_message(replies, reply)


def main() -> None:
    """Takes the protocol's descriptors for itself and serves."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.dup2(2, 1)
    serve(requests, replies)
    os._exit(0)  # threads that a function left behind must not keep the process


if __name__ == "__main__":
    main()
