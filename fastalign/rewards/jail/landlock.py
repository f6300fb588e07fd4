"""Landlock (Linux 5.13): only the named paths can be read, only the work folder written, no TCP port used."""

from __future__ import annotations

import ctypes
import os
import stat

import kernel

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE = 1, 2, 4, 8, 1 << 14
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_RIGHTS_BY_ABI = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # how many of the rights, from bit 0 up, that version knows
_NET_SINCE, _SCOPE_SINCE = 4, 6


def version() -> int:
    """The Landlock version of this kernel; 0 where there is none or it is switched off."""
    try:
        return kernel.syscall(_CREATE_RULESET, "landlock", 0, 0, 1)
    except OSError:
        return 0


def restrict(readable: list[str], writable: list[str], devices: list[str]) -> None:
    """Confines this process and its children to come.

    Args:
        readable: files and folders whose contents may be read and executed; one that does not exist is left out.
        writable: folders with every right.
        devices: files that may be read and written.

    Raises:
        OSError: where the kernel has no Landlock or refuses a rule.
    """
    abi = version()
    if not abi:
        raise OSError("Landlock is not available")
    every = (1 << _RIGHTS_BY_ABI.get(abi, 16)) - 1
    attributes = kernel.words(8, every, 3 if abi >= _NET_SINCE else 0, 3 if abi >= _SCOPE_SINCE else 0)
    size = 24 if abi >= _SCOPE_SINCE else 16 if abi >= _NET_SINCE else 8
    ruleset = kernel.syscall(_CREATE_RULESET, "landlock_create_ruleset", ctypes.c_char_p(attributes), size, 0)
    try:
        for paths, rights in ((readable, _READ), (writable, every), (devices, _READ_FILE | _WRITE_FILE | _TRUNCATE)):
            for path in paths:
                _allow(ruleset, path, rights & every)
        kernel.syscall(_RESTRICT_SELF, "landlock_restrict_self", ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        file = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not stat.S_ISDIR(os.fstat(file).st_mode):
            rights &= _FILE_RIGHTS
        rule = kernel.words(8, rights) + kernel.words(4, file)
        kernel.syscall(_ADD_RULE, f"landlock_add_rule {path}", ruleset, 1, ctypes.c_char_p(rule), 0)
    finally:
        os.close(file)
