"""A prompt and its samples: what the scheduler places."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fastalign.generation.blocks import Blocks
from fastalign.generation.params import SamplingParams
from fastalign.generation.rows import Record, Rows, RowSpec
from fastalign.generation.stops import StopScanner

MAX_SAMPLES = 1 << 20  # of one group: `order` keeps the sample in its low 20 bits


@dataclass(eq=False)
class Member:
    """One sample of a group.

    Attributes:
        row: its row while it runs, else -1.
        record: what it has drawn, while it does not run.
        high_water: tokens that have been forwarded once already.
        finish_reason: "" until it ends.
        top_logprobs: a list of (token id, log-prob) a token, where the request asks for them.
        streamed: tokens that the caller has been given already; told: whether it knows that the sample has ended.
    """

    group: Group
    index: int
    row: int = -1
    record: Record = field(default_factory=Record.empty)
    high_water: int = 0
    scanner: StopScanner | None = None
    finish_reason: str = ""
    stop_reason: int | str | None = None
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    streamed: int = 0
    told: bool = False


@dataclass(eq=False)
class Group:
    """A prompt and its samples.

    Attributes:
        index: arrival order. place: which prompt of its call it is, for messages.
        prompt: int64 token ids.
        seed, request, first_sample: the random key; member j draws as sample first_sample + j.
        limit: total tokens at which a sample ends.
        stop_set: its row of the stop table.
        members: one until the prompt is computed, then n.
        waiting: members without a row, youngest first.
        hold: the prompt's blocks, kept alive for waiting members while no sibling may run; None when not needed.
        priority: groups with a lower value go first; equals in the order of arrival.
        logprobs: whether log-probs are wanted.
        live: it may be extended, or asked again with its completion.
        error: what ended it, where something went wrong.
    """

    index: int
    prompt: NDArray[np.int64]
    params: SamplingParams
    seed: int
    request: int
    limit: int
    stop_set: int = 0
    first_sample: int = 0
    members: list[Member] = field(default_factory=list)
    waiting: list[Member] = field(default_factory=list)
    hold: Blocks | None = None
    priority: int = 0
    logprobs: bool = True
    live: bool = False
    error: Exception | None = None
    place: int = 0

    def __post_init__(self) -> None:
        self.members.append(Member(self, 0))
        self.waiting.append(self.members[0])

    @property
    def rank(self) -> tuple[int, int]:
        """Who goes first: the lower one."""
        return self.priority, self.index

    @property
    def done(self) -> bool:
        """Whether every sample has ended."""
        return self.forked and all(member.finish_reason for member in self.members)

    def unfinished(self) -> Iterator[Member]:
        """The samples that have not ended; before the fork there is one."""
        return (member for member in self.members if not member.finish_reason)

    @property
    def forked(self) -> bool:
        return len(self.members) == self.params.n

    def break_off(self, error: BaseException, rows: Rows | None) -> None:
        """Ends its samples with what they have, after an error in the middle of a step; `rows` are no longer theirs."""
        for member in self.members:
            if member.row >= 0 and rows is not None:
                member.record, member.row = rows.record(member.row), -1
            member.finish_reason = member.finish_reason or "error"
        missing = range(len(self.members), self.params.n)
        self.members.extend(Member(self, j, finish_reason="error") for j in missing)
        self.error = RuntimeError(f"the engine's step broke off: {type(error).__name__}: {error}")

    def spec(self, member: Member) -> RowSpec:
        order = self.index * MAX_SAMPLES + member.index
        draws = 1 if self.forked else self.params.n
        sample = self.first_sample + member.index
        return RowSpec(self.params, self.seed, self.request, sample, self.limit, self.stop_set, order, draws, self.priority, self.logprobs)
