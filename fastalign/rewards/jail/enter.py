"""Forks a process for each sandbox, which builds it around one program and waits for that.

Runs as a script of its own, isolated and without site packages. stdin is a socket: each message brings the descriptors of one sandbox,
`DESCRIPTORS`, in that order. The setup comes on control, marshalled; the end of that stream, which a dead parent brings about too,
ends the sandbox. stdout and stderr are the program's. The status gets "pid N", "started", then what became of the program as
`watch.until_end` words it, one line each; or "error …" when the sandbox could not be built, and nothing was run.

Three processes: the fork of this one stays outside; "first" is process 1 of the new process namespace, whose end takes every other one
along; the program is its child. As root without the right to make namespaces there is no first: the program gets a user of its own,
and the one outside, to which its orphans fall, ends whatever that user still runs.
"""

from __future__ import annotations

import marshal
import os
import resource
import select
import socket
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import examine
import kernel
import landlock
import root
import seccomp
import watch

DESCRIPTORS = ("control", "stdin", "stdout", "stderr", "status")
_INSIDE = 1000  # the user in a user namespace
_FIRST_USER, _SPARE_USER = 1_200_000_000, 1_300_000_000
_PR_SET_CHILD_SUBREAPER = 36
_OPEN_FILES = 256


def users() -> tuple[int, int]:
    """A user of this sandbox's own and one that owns nothing, both unnamed: made from the process id."""
    with open("/proc/self/uid_map") as file:
        inside, _, count = map(int, file.readlines()[-1].split())
    if inside + count > _SPARE_USER + (1 << 23):
        return _FIRST_USER + os.getpid(), _SPARE_USER + os.getpid()
    return 20_000 + os.getpid() % 20_000, 40_000 + os.getpid() % 20_000  # a container of 65,536 users


def limit(setup: dict) -> None:
    """The limits of one process, and how many there may be."""
    limits = {
        resource.RLIMIT_CPU: setup["cpu_seconds"],
        resource.RLIMIT_AS: setup["memory_bytes"],
        resource.RLIMIT_FSIZE: setup["disk_bytes"],
        resource.RLIMIT_NPROC: setup["processes"] + 2,
        resource.RLIMIT_NOFILE: _OPEN_FILES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def become(setup: dict, uid: int | None, work: str) -> None:
    """Turns this process into the program: gives up every right, then executes it, or `examine`. Returns only by raising."""
    os.setsid()  # a signal to its group reaches no process of ours
    os.chdir(work)
    limit(setup)
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    kernel.drop_capabilities()
    kernel.die_with_parent(watch.SIGKILL)
    os.umask(0o077)
    for name, text in setup["files"].items():
        with open(name, "wb") as file:
            file.write(text)
        os.chmod(name, 0o700)
    kernel.forbid_privileges()
    if landlock.version() or setup["way"] == "uid":
        landlock.restrict([*setup["readable"], "/proc"] if work == root.WORK else setup["readable"], [work], list(root.DEVICES))
    if seccomp.available():
        seccomp.restrict()
    os.dup2(setup["stdin"], 0)
    kernel.default_signals()
    if setup["command"]:
        os.execve(setup["command"][0], setup["command"], setup["environment"])
    as_examiner(setup["environment"])


def as_examiner(environment: dict[str, str]) -> None:
    """Becomes `examine` without starting Python again, as new as can be: no descriptor, variable or module of this file stays."""
    try:
        os.closerange(3, 2 * _OPEN_FILES)
        for number in (kernel.SIGPIPE, kernel.SIGXFSZ):  # as Python has it
            kernel.ignore_signal(number)
        os.environ.clear()
        os.environ.update(environment)
        sys.dont_write_bytecode = True
        sys.path.remove(os.path.dirname(os.path.abspath(__file__)))
        for module in (examine, kernel, landlock, root, seccomp, watch):
            del sys.modules[module.__name__]
        examine.main()
    finally:
        os._exit(0)


def start(setup: dict, uid: int | None, work: str) -> int:
    """Forks the program; its failure before it runs goes to the status descriptor."""
    report(setup, "started")
    child = os.fork()
    if child == 0:
        try:
            become(setup, uid, work)
        except BaseException as error:
            report(setup, f"error {error}")
        os._exit(127)
    return child


def report(setup: dict, line: str) -> None:
    os.write(setup["status"], line.replace("\n", " ").encode() + b"\n")


def first(setup: dict, uid: int | None, alive: int) -> None:
    """Process 1: makes the other namespaces and the root, runs the program, and ends with it."""
    kernel.die_with_parent(watch.SIGKILL)
    if select.select([alive], [], [], 0)[0]:  # the parent was gone before it was asked to take this process along
        os._exit(1)
    kernel.unshare(kernel.NEW_NS | kernel.NEW_NET | kernel.NEW_IPC | kernel.NEW_UTS, "mount, network, ipc, uts namespaces")
    owner = _INSIDE if uid is None else uid
    root.build(setup["folder"], setup["readable"], setup["disk_bytes"], (owner, owner))
    kernel.forbid_inspection()
    report(setup, watch.until_end(start(setup, uid, root.WORK), None, setup["memory_bytes"]))


def in_namespaces(setup: dict) -> None:
    """The sandbox of root, and of a user who may make user namespaces."""
    uid: int | None = None
    if setup["way"] == "root":
        uid, _ = users()
        kernel.unshare(kernel.NEW_PID, "process namespace")
    else:
        user, group = os.geteuid(), os.getegid()
        kernel.unshare(kernel.NEW_USER | kernel.NEW_PID, "user and process namespaces")
        for name, text in (("setgroups", "deny"), ("uid_map", f"{_INSIDE} {user} 1"), ("gid_map", f"{_INSIDE} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    alive, parent = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(parent)
        os.close(0)
        os.open(os.devnull, os.O_RDONLY)
        kernel.default_signals()
        try:
            first(setup, uid, alive)
        except BaseException as error:
            report(setup, f"error {error}")
        os._exit(0)
    select.select([0, os.pidfd_open(child)], [], [])
    os.kill(child, watch.SIGKILL)  # it may have ended, but nobody has waited for it yet
    os.waitpid(child, 0)  # returns when the whole process namespace is gone


def with_own_user(setup: dict) -> None:
    """The sandbox of root without namespaces: a user of its own, Landlock and the call filter do their work."""
    if not seccomp.available():
        raise OSError(f"no system-call filter is written for {kernel.machine()}")
    uid, spare = users()
    kernel.prctl(_PR_SET_CHILD_SUBREAPER, "PR_SET_CHILD_SUBREAPER", 1)
    os.chown(setup["folder"], uid, uid)
    kernel.forbid_inspection()
    child = start(setup, uid, setup["folder"])
    try:
        limits = {"memory_bytes": setup["memory_bytes"], "disk_bytes": setup["disk_bytes"]}
        outcome = watch.until_end(child, uid, control=0, folder=setup["folder"], **limits)
    finally:
        watch.kill_user(uid, spare)
    report(setup, outcome)


def read_setup() -> dict:
    """What to do, from control.

    Raises:
        EOFError: its sender has ended.
    """
    with open(os.dup(0), "rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        return marshal.loads(stream.read(size))


def attend(files: list[int]) -> None:
    """One sandbox, from its setup to its end."""
    named = dict(zip(DESCRIPTORS, files, strict=True))
    os.setsid()
    kernel.default_signals()
    kernel.ignore_signal(kernel.SIGPIPE)  # nobody may be left to read the status
    for place, name in enumerate(("control", "stdout", "stderr")):
        os.dup2(named[name], place)
        os.close(named[name])
    setup = {**read_setup(), "stdin": named["stdin"], "status": named["status"]}
    report(setup, f"pid {os.getpid()}")
    try:
        if setup["way"] == "uid":
            with_own_user(setup)
        else:
            in_namespaces(setup)
    except BaseException as error:
        report(setup, f"error {error}")
    finally:
        remove(setup["folder"])


def remove(folder: str) -> None:
    """Takes the folder away, whose processes have ended; who started this may have been killed."""
    for place, folders, files in os.walk(folder, topdown=False):
        for name in files:
            os.unlink(os.path.join(place, name))
        for name in folders:
            path = os.path.join(place, name)
            os.unlink(path) if os.path.islink(path) else os.rmdir(path)
    os.rmdir(folder)


def main() -> None:
    """Serves the socket until its other end closes."""
    door = socket.socket(fileno=0)
    kernel.ignore_signal(kernel.SIGCHLD)  # its children are not waited for
    while True:
        message, files, _, _ = socket.recv_fds(door, 1, len(DESCRIPTORS))
        if not message:
            return
        for file in files:
            os.set_inheritable(file, False)
        try:
            child = os.fork()
        except OSError:  # the descriptors' end says it
            child = -1
        if child == 0:
            try:
                attend(files)
            finally:
                os._exit(0)
        for file in files:
            os.close(file)


if __name__ == "__main__":
    main()
