"""Waiting for a confined program: reaping its orphans, and ending it when it takes too much memory or disk together."""

from __future__ import annotations

import contextlib
import os
import select
import signal

import kernel

_PERIOD_SECONDS = 0.05
_ROUNDS = 1000


def until_end(child: int, uid: int | None, memory_bytes: int, control: int | None = None, folder: str = "", disk_bytes: int = 0) -> str:
    """What became of `child`: "exit N", "signal N", "memory", "disk", or "stopped" when `control` closes first.

    SIGCHLD must be blocked. Limits are looked at 20 times a second.

    Args:
        child: its process id.
        uid: the user whose processes count; None: every process that /proc shows, but this one.
        memory_bytes: private memory of all of them together.
        control: a descriptor whose end of file asks to stop.
        folder: where `disk_bytes` may lie; empty: not watched.
        disk_bytes: the most that files of the folder may hold together.
    """
    while True:
        signal.sigtimedwait({signal.SIGCHLD}, _PERIOD_SECONDS)
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == child:
                    code = os.waitstatus_to_exitcode(ended[1])
                    return f"exit {code}" if code >= 0 else f"signal {-code}"
        if control is not None and select.select([control], [], [], 0)[0]:
            return "stopped"
        if resident_bytes(uid) > memory_bytes:
            return "memory"
        if folder and disk_use(folder) > disk_bytes:
            return "disk"


def resident_bytes(uid: int | None) -> int:
    """The private memory of a user's processes; with None of all but this one."""
    total, own = 0, str(os.getpid())
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc"):
            if not name.isdigit() or name == own:
                continue
            with contextlib.suppress(OSError, ValueError), open(f"/proc/{name}/status", "rb") as file:
                found = {line.split()[0]: line.split()[1] for line in file if line.startswith((b"Uid:", b"RssAnon:"))}
                if uid is None or int(found[b"Uid:"]) == uid:
                    total += int(found.get(b"RssAnon:", 0)) * 1024
    return total


def disk_use(folder: str) -> int:
    """The bytes that the files under a folder take."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
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
                try:
                    os.kill(1, 0)  # whoever may signal pid 1 holds more than it should
                except PermissionError:
                    os.kill(-1, signal.SIGKILL)
            except BaseException:
                pass
            os._exit(0)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        if not _any_child():
            return


def _any_child() -> bool:
    try:
        return select.select([], [], [], 0.002) is not None and os.waitpid(-1, os.WNOHANG)[0] >= 0
    except ChildProcessError:
        return False
