"""A system-call filter: no socket, no new namespace, no mount, no tracing, none of the kernel's less travelled entrances.

The filter is classic BPF over (number, architecture, arguments). A call of a foreign architecture kills the process, because its
numbers mean other calls.
"""

from __future__ import annotations

import ctypes
import errno

import kernel

_SHARED = {  # numbers that every architecture since Linux 5.1 shares
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428, "move_mount": 429, "fsopen": 430,
    "fsconfig": 431, "fsmount": 432, "fspick": 433, "pidfd_getfd": 438, "mount_setattr": 442,
}  # fmt: skip
_OWN = {
    "x86_64": {
        "socket": 41, "ptrace": 101, "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "unshare": 272, "setns": 308,
        "bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "keyctl": 250, "add_key": 248, "request_key": 249, "quotactl": 179,
        "kexec_load": 246, "kexec_file_load": 320, "init_module": 175, "finit_module": 313, "delete_module": 176, "reboot": 169,
        "swapon": 167, "open_by_handle_at": 304, "process_vm_readv": 310, "process_vm_writev": 311, "shmget": 29, "semget": 64,
        "msgget": 68, "mq_open": 240, "syslog": 103,
    },
    "aarch64": {
        "socket": 198, "ptrace": 117, "mount": 40, "umount2": 39, "pivot_root": 41, "chroot": 51, "unshare": 97, "setns": 268,
        "bpf": 280, "perf_event_open": 241, "userfaultfd": 282, "keyctl": 219, "add_key": 217, "request_key": 218, "quotactl": 60,
        "kexec_load": 104, "kexec_file_load": 294, "init_module": 105, "finit_module": 273, "delete_module": 106, "reboot": 142,
        "swapon": 224, "open_by_handle_at": 265, "process_vm_readv": 270, "process_vm_writev": 271, "shmget": 194, "semget": 190,
        "msgget": 186, "mq_open": 180, "syslog": 116,
    },
}  # fmt: skip
_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE3 = 435
_FIRST_X32 = 0x40000000  # x86-64 alone: the same calls again under other numbers
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_PR_SET_SECCOMP, _MODE_FILTER = 22, 2

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, constant


def available() -> bool:
    """Whether the filter is written for this machine."""
    return kernel.machine() in _OWN


def program(machine: str) -> list[Instruction]:
    """The filter's instructions."""
    refuse, missing = _ERROR | errno.EACCES, _ERROR | errno.ENOSYS
    lines: list[Instruction] = [
        (_LOAD, 0, 0, 4), (_EQUAL, 1, 0, _ARCHITECTURE[machine]), (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0), (_AT_LEAST, 0, 1, _FIRST_X32), (_RETURN, 0, 0, _KILL),
        (_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, missing),  # its flags are behind a pointer; libc then uses clone
    ]  # fmt: skip
    for number in sorted({**_SHARED, **_OWN[machine]}.values()):
        lines += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, refuse)]
    namespaces = kernel.NEW_NS | kernel.NEW_UTS | kernel.NEW_IPC | kernel.NEW_USER | kernel.NEW_PID | kernel.NEW_NET | 0x2000000
    lines += [(_EQUAL, 0, 3, _CLONE[machine]), (_LOAD, 0, 0, 16), (_ANY_BIT, 0, 1, namespaces), (_RETURN, 0, 0, refuse)]
    return [*lines, (_RETURN, 0, 0, _ALLOW)]


def restrict() -> None:
    """Confines this process and its children to come; asks for NO_NEW_PRIVS to be set.

    Raises:
        OSError: where the kernel refuses filters.
    """
    code = b"".join(kernel.words(2, c) + kernel.words(1, yes, no) + kernel.words(4, k) for c, yes, no, k in program(kernel.machine()))
    body = ctypes.create_string_buffer(code, len(code))
    header = kernel.words(8, len(code) // 8, ctypes.addressof(body))  # a 16-bit length with its padding, and the place
    holder = ctypes.create_string_buffer(header, len(header))
    kernel.prctl(_PR_SET_SECCOMP, "seccomp filter", _MODE_FILTER, ctypes.addressof(holder))
