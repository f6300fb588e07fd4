"""The process that sandboxes are forked from: started once, with what they need imported, and holding nothing of this process.

Starting Python for each sandbox takes 25 ms of processor time, forking this process 1 ms. It ends when its socket does.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

_ENTER = Path(__file__).with_name("jail") / "enter.py"


class _Nursery:
    def __init__(self) -> None:
        self.door, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_ENTER)],
                stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={}, cwd="/", start_new_session=True,
            )  # fmt: skip

    def close(self) -> None:
        self.door.close()
        self._process.kill()
        self._process.wait()


_lock = threading.Lock()
_nursery: _Nursery | None = None


def enter(files: Sequence[int]) -> None:
    """Hands five descriptors (`jail/enter.py` names them) to a new process. They stay open here, too.

    Raises:
        OSError: no process can be started.
    """
    global _nursery
    with _lock:
        if _nursery is not None:
            with contextlib.suppress(OSError):  # it was killed: start another
                socket.send_fds(_nursery.door, [b"+"], list(files))
                return
            _nursery.close()
        _nursery = _Nursery()
        socket.send_fds(_nursery.door, [b"+"], list(files))


def _forget() -> None:
    """A process that was forked from this one starts a nursery of its own."""
    global _lock, _nursery
    _lock, _nursery = threading.Lock(), None


os.register_at_fork(after_in_child=_forget)
