"""Ctrl-C that loses nothing: the first one asks the loop to save and stop, the second one stops it at once."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """The flag that the loop polls between micro-steps.

    Attributes:
        requested: True once SIGINT or SIGTERM has arrived.
    """

    def __init__(self) -> None:
        self.requested = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        name = signal.Signals(number).name
        print(f"\nfastalign: {name}: finishing the step, then saving; once more to stop at once", file=sys.stderr, flush=True)


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """`with interruptible() as interrupt:` the first SIGINT or SIGTERM sets `interrupt.requested`, the second raises.

    The loop saves and raises `KeyboardInterrupt` itself when it sees the flag. The former handlers come back at the
    end. In a thread other than the main one no handler can be set: the flag then never rises.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    former = {number: signal.signal(number, interrupt.handle) for number in numbers}
    try:
        yield interrupt
    finally:
        for number, handler in former.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
