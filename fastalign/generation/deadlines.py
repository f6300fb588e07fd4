"""Requests whose time is limited, the first to end first."""

from __future__ import annotations

import heapq
import time

from fastalign.generation.groups import Group

FEW = 64  # so many that have ended may stay


class Deadlines:
    """Groups with a timeout, from the moment that they are added."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Group]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, group: Group) -> None:
        """Starts the group's time, if it has one."""
        if group.params.timeout is None:
            return
        if len(self._heap) >= FEW and len(self._heap) & (len(self._heap) - 1) == 0:  # at each power of two
            self._heap = [entry for entry in self._heap if not entry[2].done]
            heapq.heapify(self._heap)
        heapq.heappush(self._heap, (time.monotonic() + group.params.timeout, group.index, group))

    def passed(self) -> list[Group]:
        """Takes out the groups whose time is over; those that have not ended."""
        found, now = [], time.monotonic()
        while self._heap and self._heap[0][0] <= now:
            group = heapq.heappop(self._heap)[2]
            if not group.done:
                found.append(group)
        return found

    def clear(self) -> None:
        """Forgets all."""
        self._heap.clear()
