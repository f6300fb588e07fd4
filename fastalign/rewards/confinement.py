"""Running a stranger's program on Linux: in namespaces or under a user of its own, with Landlock, a call filter and limits.

The program sees the interpreter, the system's libraries and a folder of its own; no network, no other process, no variable of this
one's environment. Nothing here forks this process: `jail/enter.py` is started afresh and builds the sandbox around the program.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import socket
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from .sandbox import ConfinementUnavailable, Limits, Outcome, Running

__all__ = ["ConfinementUnavailable", "Limits", "Outcome", "Running", "confinement", "run_command", "run_python", "start_examiner"]

_JAIL = Path(__file__).with_name("jail")
_SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/bin", "/sbin", "/etc/ld.so.cache", "/etc/localtime", "/etc/alternatives")
_REMEDY = (
    "Programs are run only where they can be confined: on Linux 5.13 or newer, as a user who may make user namespaces (a container "
    "started with --security-opt seccomp=unconfined, or sysctl kernel.apparmor_restrict_unprivileged_userns=0), or as root, whose "
    "interpreter and TMPDIR every user can enter"
)


def run_python(source: str, *, stdin: str = "", limits: Limits | None = None) -> Outcome:
    """Runs Python source with this interpreter and its packages, confined.

    Args:
        source: the program.
        stdin: what it reads.
        limits: what it may use; None: `Limits()`.

    Raises:
        ConfinementUnavailable: nothing was run, because it cannot be confined here.
    """
    launch = (_JAIL / "program.py").read_text(encoding="utf-8")
    command = [sys.executable, "-I", "-B", "-S", "-c", launch, *package_paths()]
    with Running(command, confinement(), files={"program.py": source}, readable=interpreter_paths(), limits=limits) as running:
        running.send(stdin.encode("utf-8", "surrogatepass"), last=True)
        return running.finish()


def start_examiner(limits: Limits | None = None) -> Running:
    """Starts what puts programs to their tests, `jail/examine.py`, confined, to talk with it.

    Raises:
        ConfinementUnavailable: nothing was run, because it cannot be confined here.
    """
    return Running([], confinement(), readable=interpreter_paths(), limits=limits)


def run_command(
    command: Sequence[str], *, files: Mapping[str, str] | None = None, readable: Sequence[str] = (), limits: Limits | None = None,
    stdin: str = "",
) -> Outcome:  # fmt: skip
    """Runs a command, confined, in a folder that holds `files`.

    Args:
        command: a program that PATH finds, or a path; and its arguments.
        files: names and texts.
        readable: files and folders that it may read besides the system's programs and libraries.
        limits: what it may use; None: `Limits()`.
        stdin: what it reads.

    Raises:
        ValueError: for a program that is not there.
        ConfinementUnavailable: nothing was run, because it cannot be confined here.
    """
    program = shutil.which(command[0])
    if program is None:
        raise ValueError(f"expected a program on PATH or a path to one, got {command[0]!r}")
    program = os.path.abspath(program)
    paths = [*_SYSTEM, program, os.path.realpath(program), *map(os.path.abspath, readable)]
    with Running([program, *command[1:]], confinement(), files=files, readable=paths, limits=limits) as running:
        running.send(stdin.encode("utf-8", "surrogatepass"), last=True)
        return running.finish()


def package_paths() -> list[str]:
    """Where this interpreter's packages are."""
    return sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})


@lru_cache(maxsize=1)
def interpreter_paths() -> tuple[str, ...]:
    """What this interpreter needs to read: itself, its library, its packages, the system's libraries."""
    prefixes = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix, *sysconfig.get_paths().values()}
    prefixes |= {sys.executable, getattr(sys, "_base_executable", sys.executable)}
    both = {path for given in prefixes if given for path in (os.path.abspath(given), os.path.realpath(given))}
    return (*_SYSTEM, *sorted(path for path in both - {"/"} if os.path.exists(path)))


@lru_cache(maxsize=1)
def confinement() -> str:
    """The first way to confine a program that works here, proven by a program that tries to get out: "root", "user" or "uid".

    Raises:
        ConfinementUnavailable: none works; says what each lacked and what helps.
    """
    if not sys.platform.startswith("linux"):
        raise ConfinementUnavailable(f"programs cannot be confined on {platform.system()}. {_REMEDY}.")
    reasons = []
    for way in ("root", "uid") if os.geteuid() == 0 else ("user",):
        try:
            breaches = probe(way)
        except (OSError, ConfinementUnavailable) as error:
            breaches = [str(error)]
        if not breaches:
            return way
        reasons.append(f"{_MEANING[way]}: {'; '.join(breaches)}")
    raise ConfinementUnavailable(f"programs cannot be confined here ({' | '.join(reasons)}). {_REMEDY}.")


_MEANING = {"root": "namespaces", "user": "user namespace", "uid": "a user of its own"}


def probe(way: str) -> list[str]:
    """What a program that is confined in this way could do and must not; empty when it is held.

    Raises:
        ConfinementUnavailable: the sandbox cannot be built.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastalign-probe-")))
        folder.chmod(0o777)  # so that only the sandbox stands between the program and the file
        secret = folder / "secret"
        secret.write_text("secret")
        secret.chmod(0o666)
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        environment = Path("/proc/self/environ").read_bytes()
        facts = {
            "pid": os.getpid(), "port": listener.getsockname()[1], "secret": str(secret), "outside": str(folder / "outside"),
            "environment": hashlib.sha256(environment).hexdigest(),
        }  # fmt: skip
        command = [sys.executable, "-I", "-B", "-S", "-c", (_JAIL / "probe.py").read_text(encoding="utf-8")]
        running = Running(command, way, readable=interpreter_paths(), limits=Limits(seconds=60.0))
        stack.enter_context(running)
        running.send(json.dumps(facts).encode(), last=True)
        outcome = running.finish()
    lines = outcome.stdout.splitlines()
    if outcome.returncode != 0 or lines[-1:] != ["end"]:
        return [f"the interpreter does not run in it: {outcome.stderr.strip()[-300:] or outcome.returncode}"]
    return lines[:-1]
