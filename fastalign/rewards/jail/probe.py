"""Tries, inside a sandbox, what it must forbid, and prints what succeeded, one line each. The last line is "end"."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import socket
import sys
from collections.abc import Callable


def _opens(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(1) is not None


def _writes(path: str) -> bool:
    with open(path, "w") as file:
        return file.write("x") == 1


def _connects(port: int) -> bool:
    with socket.socket() as connection:
        connection.settimeout(1.0)
        connection.connect(("127.0.0.1", port))
    return True


def _sends() -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagram:
        return datagram.sendto(b"x", ("127.0.0.1", 9)) == 1


def _reads_environment(pid: int, digest: str) -> bool:
    with open(f"/proc/{pid}/environ", "rb") as file:
        return hashlib.sha256(file.read()).hexdigest() == digest


def _signals(pid: int) -> bool:
    os.kill(pid, 0)
    return True


def _privileged() -> bool:
    with open("/proc/self/status") as file:
        return any(int(line.split()[1], 16) for line in file if line.startswith(("CapEff:", "CapPrm:")))


def _makes_namespaces() -> bool:
    return ctypes.CDLL(None).unshare(0x10000000) == 0


def attempts(facts: dict) -> dict[str, Callable[[], bool]]:
    """What to try, by what it would mean that it succeeds."""
    pid = facts["pid"]
    found: dict[str, Callable[[], bool]] = {
        "it reaches the network": lambda: _connects(facts["port"]),
        "it sends datagrams": _sends,
        "it reads files that are not its own": lambda: _opens(facts["secret"]),
        "it writes outside its folder": lambda: _writes(facts["outside"]),
        "it reads the environment of the process that started it": lambda: _reads_environment(pid, facts["environment"]),
        "it is root": lambda: 0 in (os.geteuid(), os.getuid()),
        "it holds capabilities": _privileged,
        "it makes namespaces": _makes_namespaces,
    }
    if pid > 50:  # a small number may be one of the sandbox's own
        found["it reads the memory of the process that started it"] = lambda: _opens(f"/proc/{pid}/mem")
        found["it signals the process that started it"] = lambda: _signals(pid)
    return found


for meaning, attempt in attempts(json.load(sys.stdin)).items():
    try:
        if attempt():
            print(meaning)
    except (OSError, ValueError):
        pass
print("end")
