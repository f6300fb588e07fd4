"""Waiting for a confined program: reaping its orphans, and ending it when it takes too much memory or disk together."""

from __future__ import annotations

import os
import select

import kernel

_PERIOD_SECONDS = 0.05
_ROUNDS = 1000
SIGKILL = 9


def until_end(child: int, uid: int | None, memory_bytes: int, control: int | None = None, folder: str = "", disk_bytes: int = 0) -> str:
    """What became of `child`: "exit N", "signal N", "memory", "disk", or "stopped" when `control` closes first.

    Limits are looked at 20 times a second.

    Args:
        child: its process id.
        uid: the user whose processes count; None: every process that /proc shows, but this one.
        memory_bytes: private memory of all of them together.
        control: a descriptor whose end of file asks to stop.
        folder: where `disk_bytes` may lie; empty: not watched.
        disk_bytes: the most that files of the folder may hold together.
    """
    awaited = [os.pidfd_open(child)] + ([] if control is None else [control])
    while True:
        ready = select.select(awaited, [], [], _PERIOD_SECONDS)[0]
        while (ended := reap())[0] > 0:
            if ended[0] == child:
                code = os.waitstatus_to_exitcode(ended[1])
                return f"exit {code}" if code >= 0 else f"signal {-code}"
        if control in ready:
            return "stopped"
        if resident_bytes(uid) > memory_bytes:
            return "memory"
        if folder and disk_use(folder) > disk_bytes:
            return "disk"


def reap() -> tuple[int, int]:
    """Process id and status of a child that has ended; (0, 0) where none has, (-1, 0) where there is no child."""
    try:
        return os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return -1, 0


def resident_bytes(uid: int | None) -> int:
    """The private memory of a user's processes; with None of all but this one."""
    try:
        names = set(filter(str.isdigit, os.listdir("/proc"))) - {str(os.getpid())}
    except OSError:  # no /proc could be mounted
        return 0
    return sum(_private_bytes(name, uid) for name in names)


def _private_bytes(name: str, uid: int | None) -> int:
    try:
        with open(f"/proc/{name}/status", "rb") as file:
            found = {line.split()[0]: int(line.split()[1]) for line in file if line.startswith((b"Uid:", b"RssAnon:"))}
    except OSError:  # it has just ended
        return 0
    return found.get(b"RssAnon:", 0) * 1024 if uid in (None, found.get(b"Uid:")) else 0


def disk_use(folder: str) -> int:
    """The bytes that the files under a folder take."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
            except OSError:  # it has just been removed
                continue
    return total


def kill_user(uid: int, spare: int) -> None:
    """Ends every process of a user that is the sandbox's alone; the caller is root and their subreaper.

    The signal is sent by a process whose effective user is theirs and whose real user is `spare`, so that they cannot end it first.
    """
    for _ in range(_ROUNDS):
        sender = os.fork()
        if sender == 0:
            try:
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(spare, uid, spare)
                kernel.drop_capabilities()
                _kill_all()
            finally:
                os._exit(0)
        os.waitpid(sender, 0)
        while (ended := reap())[0] > 0:
            pass
        if ended[0] < 0:
            return
        select.select([], [], [], 0.002)


def _kill_all() -> None:
    try:
        os.kill(1, 0)  # whoever may signal process 1 holds more than it should
    except PermissionError:
        os.kill(-1, SIGKILL)
