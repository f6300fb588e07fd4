"""`code`: the program of a completion against the tests of its record, confined; `command`: a completion in a file, and any checker."""

from __future__ import annotations

import contextlib
import json
import logging
import marshal
import math
import os
import re
import secrets
import shlex
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from .answers import after_thinking
from .completions import Completion, text_of
from .confinement import Limits, Outcome, Running, confinement, package_paths, run_command, start_examiner
from .program_values import matches
from .unit_tests import Run, Test, Value, Whole, read_tests

logger = logging.getLogger("fastalign")

_BLOCK = re.compile(r"^[ \t]*```[ \t]*([\w+#.-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_PYTHON = ("python", "py", "python3")
_REPLY_BYTES = 8 << 20
_LEAST_OUTPUT = 1 << 16  # bytes of stdout that a run may write at the least before it is wrong


def last_block(text: str, languages: Sequence[str] = ()) -> str | None:
    """The last fenced block of one of the languages, else the last without a language; with no languages, the last of all."""
    blocks = [(match.group(1).lower(), match.group(2)) for match in _BLOCK.finditer(text)]
    for wanted in (languages, ("",)) if languages else ([language for language, _ in blocks],):
        found = [body for language, body in blocks if language in wanted]
        if found:
            return found[-1]
    return None


def code(
    completions: Sequence[Completion], *, timeout: float = 10, memory_mb: float = 1024, disk_mb: float = 64, processes: float = 32,
    workers: float = 0, all: float = 0, block: str = "python", **columns: Any,
) -> list[float | None]:  # fmt: skip
    """The fraction of the record's tests that the program passes; with all=1 it is 1 where all pass, else 0.

    The program is the last ```python block (else the last without a language) after the last </think>; block=any takes the whole
    text where there is none, otherwise such a completion scores 0. Where the tests are: `unit_tests.read_tests`. A record without
    tests has no reward. Programs run confined, `workers` at a time (0: one a core), each within `timeout` seconds for all its tests.
    """
    if block not in ("python", "any"):
        raise ValueError(f"code: expected block=python or block=any, got {block!r}")
    limits = _limits("code", timeout, memory_mb, disk_mb, processes)
    confinement()

    def score(i: int) -> float | None:
        tests = _tests(columns, i)
        if not tests:
            return None
        text = after_thinking(text_of(completions[i]))
        program = last_block(text, _PYTHON)
        if program is None and block != "any":
            return 0.0
        passed = sum(verdicts(text if program is None else program, tests, limits, stop=bool(all)))
        return float(passed == len(tests)) if all else passed / len(tests)

    return _concurrently(score, len(completions), workers)


def _tests(columns: dict[str, Any], i: int) -> list[Test]:
    try:
        return read_tests({name: values[i] for name, values in columns.items()})
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        logger.warning("reward 'code': the tests of sample %d cannot be read, so it has no reward: %s", i, error)
        return []


def _limits(name: str, timeout: float, memory_mb: float, disk_mb: float, processes: float) -> Limits:
    given = {"timeout": timeout, "memory_mb": memory_mb, "disk_mb": disk_mb, "processes": processes}
    for key, value in given.items():
        if not 0 < value < 1e9:
            raise ValueError(f"{name}: expected {key} > 0, got {value:g}")
    return Limits(timeout, math.ceil(memory_mb), math.ceil(disk_mb), math.ceil(processes))


def _concurrently(score: Any, count: int, workers: float) -> list[float | None]:
    if not count:
        return []
    cores = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(max(1, min(count, int(workers) or cores)), thread_name_prefix="fastalign-reward") as pool:
        return list(pool.map(score, range(count)))


def verdicts(program: str, tests: Sequence[Test], limits: Limits, stop: bool = False) -> list[bool]:
    """Which tests the program passes, up to the first that it fails where `stop` is set; all of them share `limits.seconds`.

    A program that ends in the middle of a test has failed it, and is started again for the next.
    """
    passed: list[bool] = []
    seconds = limits.seconds
    running: Running | None = None
    with contextlib.ExitStack() as stack:
        for test in tests:
            if running is None:
                if seconds <= 0 or (running := _start(program, isinstance(test, Whole), replace(limits, seconds=seconds))) is None:
                    break
                stack.callback(running.close)
            verdict = _examine(running, test)
            if verdict is None:
                running.close()
                seconds -= running.elapsed
                running = None
            passed.append(bool(verdict))
            if stop and not verdict:
                break
    return passed + [False] * (len(tests) - len(passed))


def _start(program: str, whole: bool, limits: Limits) -> Running | None:
    """The program, ready for its tests; None when it does not get there."""
    running = start_examiner(replace(limits, output_bytes=_REPLY_BYTES))
    reply = _ask(running, {"program": program, "packages": package_paths(), "imported": not whole})
    if reply is not None and "ready" in reply:
        return running
    running.close()
    return None


def _examine(running: Running, test: Test) -> bool | None:
    """Whether it passes; None when the program has ended, which fails it."""
    if isinstance(test, Whole):
        most = max(_LEAST_OUTPUT, 2 * len(test.stdout.encode("utf-8", "surrogatepass")))
        reply = _ask(running, {"input": test.stdin, "output_bytes": most})
        return None if reply is None else reply.get("status") == 0 and _lines(_decoded(reply.get("output"))) == _lines(test.stdout)
    for number, step in enumerate(test):
        taken = _take(running, step, fresh=number == 0)
        if not taken:
            return taken
    return True


def _take(running: Running, step: Run | Value, fresh: bool) -> bool | None:
    if isinstance(step, Value):
        reply = _ask(running, {"value": step.source, "fresh": fresh})
        return None if reply is None else "value" in reply and matches(step.expected, reply["value"])
    token = secrets.token_hex(16)
    reply = _ask(running, {"run": step.source, "fresh": fresh}, token)
    return None if reply is None else reply.get("token") == token


def _ask(running: Running, request: dict[str, Any], token: str = "") -> dict[str, Any] | None:
    for message in (marshal.dumps(request), token.encode()):
        if message:
            running.send(b"%d %b" % (len(message), message))
    line = running.receive_line()
    try:
        reply = None if line is None else json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return reply if reply is None or isinstance(reply, dict) else {}


def _decoded(output: Any) -> str:
    try:
        return bytes.fromhex(output).decode(errors="replace")
    except (ValueError, TypeError):
        return ""


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def command(
    completions: Sequence[Completion], *, run: str, suffix: str = ".txt", readable: str = "", block: str = "any", timeout: float = 30,
    memory_mb: float = 4096, disk_mb: float = 256, processes: float = 64, workers: float = 0, **columns: Any,
) -> list[float | None]:  # fmt: skip
    """What a checker says of the completion: the last line of its stdout where that is a number, else 1 for exit status 0 and 0 otherwise.

    `run` is the command, confined; {file} in it is the file that holds the completion's last fenced block, or the whole text where
    there is none (block=text: always the whole), and {record} a JSON file with the record's other columns. Programs and files that
    the command names by their path may be read, and so may what `readable` lists, divided by colons. A limit that ends it scores 0.
    """
    if block not in ("any", "text"):
        raise ValueError(f"command: expected block=any or block=text, got {block!r}")
    words, paths = _command_line(run, readable)
    limits = _limits("command", timeout, memory_mb, disk_mb, processes)
    confinement()
    name = f"completion{suffix}"

    def score(i: int) -> float | None:
        text = after_thinking(text_of(completions[i]))
        files = {name: (last_block(text) if block == "any" else None) or text}
        if "{record}" in run:
            files["record.json"] = json.dumps({key: values[i] for key, values in columns.items()}, default=str)
        line = [word.replace("{file}", name).replace("{record}", "record.json") for word in words]
        return _grade(run_command(line, files=files, readable=paths, limits=limits))

    return _concurrently(score, len(completions), workers)


def _command_line(run: str, readable: str) -> tuple[list[str], list[str]]:
    try:
        words = shlex.split(run)
    except ValueError as error:
        raise ValueError(f"command: expected a command line in run, got {run!r}: {error}") from error
    if not words or shutil.which(words[0]) is None:
        raise ValueError(f"command: expected a program on PATH or a path to one in run, got {run!r}")
    if not any("{file}" in word for word in words):
        raise ValueError(f"command: expected {{file}} in run, the place of the completion's file, got {run!r}")
    paths = [os.path.abspath(path) for path in readable.split(":") if path]
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        raise ValueError(f"command: expected files and folders in readable, got {missing[0]!r}, which does not exist")
    words = [os.path.abspath(word) if os.path.isfile(word) and (i or "/" in word) else word for i, word in enumerate(words)]
    return words, [*paths, *(word for word in words if os.path.isabs(word) and os.path.isfile(word))]


def _grade(outcome: Outcome) -> float:
    if outcome.exceeded:
        return 0.0
    with contextlib.suppress(ValueError):
        value = float(outcome.stdout.rstrip().rpartition("\n")[2])
        if math.isfinite(value):
            return value
    return float(outcome.returncode == 0)
