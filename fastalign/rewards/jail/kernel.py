"""The system calls that Python does not offer, through ctypes; every one raises OSError with what was asked for."""

from __future__ import annotations

import ctypes
import os
import sys

NEW_NS, NEW_UTS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
SIGPIPE, SIGCHLD, SIGXFSZ = 13, 17, 25

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_CAPABILITY_VERSION_3 = 0x20080522
_MOUNT_SETATTR = 442
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_CAPSET = {"x86_64": 126, "aarch64": 91}
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000

libc = ctypes.CDLL(None, use_errno=True)


def machine() -> str:
    """The instruction set that this process runs on, as the kernel names it; 32-bit processes are not "x86_64"."""
    name = os.uname().machine
    return name if sys.maxsize > 1 << 32 else f"{name} (32-bit)"


def check(result: int, what: str) -> int:
    """The result of a libc call; OSError when it is negative."""
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result


def words(size: int, *values: int) -> bytes:
    """Unsigned integers of `size` bytes each, as the kernel's structures hold them."""
    return b"".join(value.to_bytes(size, sys.byteorder) for value in values)


def syscall(number: int, what: str, *arguments: object) -> int:
    """One raw system call; integers are passed as 64-bit words."""
    return check(libc.syscall(ctypes.c_long(number), *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments)), what)


def prctl(option: int, what: str, *values: int) -> int:
    arguments = [ctypes.c_ulong(v) for v in (*values, 0, 0, 0, 0)][:4]
    return check(libc.prctl(ctypes.c_int(option), *arguments), what)


def die_with_parent(signal: int) -> None:
    prctl(_PR_SET_PDEATHSIG, "PR_SET_PDEATHSIG", signal)


def forbid_inspection() -> None:
    """No other process without privileges may read this one's memory, environment or descriptors."""
    prctl(_PR_SET_DUMPABLE, "PR_SET_DUMPABLE", 0)


def forbid_privileges() -> None:
    prctl(_PR_SET_NO_NEW_PRIVS, "PR_SET_NO_NEW_PRIVS", 1)


def drop_capabilities() -> None:
    header = words(4, _CAPABILITY_VERSION_3, 0)
    syscall(_CAPSET[machine()], "capset", ctypes.c_char_p(header), ctypes.c_char_p(bytes(24)))


def ignore_signal(number: int) -> None:
    libc.signal(ctypes.c_int(number), ctypes.c_void_p(1))


def default_signals() -> None:
    """What this process ignores, its program would ignore too."""
    for number in range(1, 65):
        libc.signal(ctypes.c_int(number), ctypes.c_void_p(0))


def unshare(flags: int, what: str) -> None:
    check(libc.unshare(ctypes.c_int(flags)), f"unshare({what})")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    places = [ctypes.c_char_p(text.encode()) for text in (source, target, kind)]
    check(libc.mount(*places, ctypes.c_ulong(flags), ctypes.c_char_p(data.encode())), f"mount {kind or 'bind'} on {target}")


def unmount(target: str) -> None:
    check(libc.umount2(ctypes.c_char_p(target.encode()), ctypes.c_int(MNT_DETACH)), f"umount {target}")


def read_only(target: str, attributes: int) -> None:
    """mount_setattr over the whole tree of mounts at `target` (Linux 5.12): MS_RDONLY, MS_NOSUID and MS_NODEV of `attributes`."""
    change = words(8, attributes, 0, 0, 0)
    arguments = (_AT_FDCWD, ctypes.c_char_p(target.encode()), _AT_RECURSIVE, ctypes.c_char_p(change), len(change))
    syscall(_MOUNT_SETATTR, f"mount_setattr {target}", *arguments)


def pivot_root(root: str) -> None:
    """Makes `root`, a mount of its own, the root folder and lets go of the old one."""
    os.chdir(root)
    here = ctypes.c_char_p(b".")
    syscall(_PIVOT_ROOT[machine()], "pivot_root", here, here)
    unmount(".")
    os.chdir("/")
