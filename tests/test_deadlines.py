"""Who runs out of time: the first to end first, and what has ended is not kept."""

from __future__ import annotations

import numpy as np
import pytest

from fastalign.generation.deadlines import FEW, Deadlines
from fastalign.generation.groups import Group
from fastalign.generation.params import SamplingParams


def group_of(index, timeout):
    return Group(index, np.array([5]), SamplingParams(timeout=timeout), 0, index, 9)


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("fastalign.generation.deadlines.time.monotonic", lambda: now[0])
    return now


def test_groups_pass_in_the_order_of_their_deadlines(clock):
    deadlines = Deadlines()
    for index, timeout in enumerate((3.0, None, 1.0, 2.0)):
        deadlines.add(group_of(index, timeout))
    assert deadlines.passed() == []
    clock[0] = 102.0
    assert [group.index for group in deadlines.passed()] == [2, 3]
    assert len(deadlines) == 1
    deadlines.clear()
    clock[0] = 200.0
    assert deadlines.passed() == []


def test_what_has_ended_is_forgotten(clock):
    deadlines = Deadlines()
    for index in range(20 * FEW):
        group = group_of(index, 1e6)
        deadlines.add(group)
        if index:  # the first goes on for ever
            group.members[0].finish_reason = "stop"
    assert len(deadlines) <= FEW + 1
    clock[0] = 1e9
    assert [group.index for group in deadlines.passed()] == [0]
