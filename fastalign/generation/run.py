"""The live sequences and what moves them: one step forwards a plan, draws, and ends what has ended."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastalign.generation.draws import Drawn, Draws, Sampled
from fastalign.generation.groups import Group, Member
from fastalign.generation.params import NotFiniteError, RequestFailedError
from fastalign.generation.rows import Record, Rows
from fastalign.generation.runner import Runner, Unread
from fastalign.generation.sampler import Sampler
from fastalign.generation.scheduler import Scheduler
from fastalign.generation.stops import StopScanner, StopTable

Ended = Callable[[int], object]
Done = Callable[[Group], object]


@dataclass(frozen=True, eq=False)
class InFlight:
    """Draws of a step that the host has not read yet.

    Attributes:
        draws, sampled: D of them.
        tenants: [D] of `rows.tenant` at that time: a draw counts while its sequence has kept its row.
        version: of the weights.
        waits: it must be read before the next step.
    """

    draws: Draws
    sampled: Sampled
    tenants: NDArray[np.int64]
    version: int
    waits: bool


class Run:
    """Puts scheduler, runner and sampler together.

    With `ahead` a step is queued on the device before the host has read what the step before drew, so that neither waits for the other.
    The next step begins with tokens that are still on the device. What that needs is known without them: a sequence is one token longer,
    and one that reaches its limit is left out. A sequence that turns out to have ended was forwarded once too often, which nobody
    sees: the draw is dropped, as is that of a sequence that lost its row meanwhile and will draw the same token again, by the same key.
    Steps that fork, and draws that read the tokens before them, are read at once.

    Args:
        rows, scheduler, runner, sampler, stops: of these sequences.
        tokenizer: for stop strings.
        version: the weight version that is recorded with every token.
        ahead: queue a step before the draws of the one before have been read.

    Attributes:
        touched: groups that drew or ended in the last step, when `tracks` is set.
        on_done: called with each group whose last sample has ended.
    """

    def __init__(
        self,
        rows: Rows,
        scheduler: Scheduler,
        runner: Runner,
        sampler: Sampler,
        stops: StopTable,
        *,
        tokenizer: Any,
        version: int,
        ahead: bool = False,
        on_finish: Ended = lambda _: None,
    ) -> None:
        self.rows, self.scheduler, self.runner, self.sampler, self.stops = rows, scheduler, runner, sampler, stops
        self.tokenizer, self.version, self.on_finish = tokenizer, version, on_finish
        self.ahead = ahead
        self.on_done: Done | None = None
        self.tracks = False
        self.touched: dict[int, Group] = {}
        self._in_flight: InFlight | None = None

    def step(self) -> None:
        """Forwards one plan and draws for the sequences whose known tokens are all in the cache; with `ahead` reads the draws before."""
        self.touched = {}
        before, self._in_flight = self._in_flight, None
        launched = self._launch(before)
        if before is not None:
            self._land(before)
        if launched is not None and self.ahead and not launched.waits:
            self._in_flight = launched
        elif launched is not None:
            self._land(launched)

    def _launch(self, before: InFlight | None) -> InFlight | None:
        """Queues a forward pass and its draws; None where nothing draws."""
        plan = self.scheduler.schedule()
        if not len(plan.rows):
            return None
        unread = None if before is None else Unread(before.sampled.tokens, before.draws.source)
        hidden = self.runner.forward(plan, unread)
        at = self.scheduler.advance(plan)
        if not len(at):
            return None
        rows, drawing = self.rows, plan.rows[at]
        draws = Draws.of(rows, drawing)
        sampled = self.sampler.draw(self.runner.select(hidden, at), draws, self.runner.keep_logits(plan, at))
        rows.expected[drawing] += 1
        waits = len(draws.source) > len(drawing) or self.sampler.waits(draws)
        return InFlight(draws, sampled, rows.tenant[draws.source], self.version, waits)

    def _land(self, flight: InFlight) -> None:
        """Reads draws, and gives them to the sequences that are still there."""
        draws, kept = flight.draws, np.flatnonzero(self.rows.tenant[flight.draws.source] == flight.tenants)
        if not len(kept):
            return
        drawn = flight.sampled.read()
        if len(kept) < len(flight.tenants):
            draws, drawn = draws.cut(kept), drawn.cut(kept)
        if (drawn.tokens < 0).any():
            draws, drawn = self._without_failed(draws, drawn)
        if self.tracks:
            for row in draws.source.tolist():
                self._touch(self._group_of(row))
        self.scheduler.stats.decoded_tokens += len(drawn.tokens)
        self._commit(draws, drawn, self._targets(draws), flight.version)

    def end(self, group: Group, finish_reason: str, stop_reason: str | None = None) -> list[Member]:
        """Ends a group's unfinished samples where they are, and frees what they hold; returns them."""
        ended = self.scheduler.cancel(group)
        for member in ended:
            member.finish_reason, member.stop_reason = finish_reason, stop_reason
        self._touch(group)
        self.on_finish(len(ended))
        self._tell_done([group])
        return ended

    def restart(self, version: int, root: bytes | None) -> None:
        """Goes on with new weights: what the old ones computed is forgotten, what they drew stays."""
        self.version = version
        self.scheduler.restart(root)

    def _touch(self, group: Group) -> None:
        self.touched[group.index] = group

    def _group_of(self, row: int) -> Group:
        member = self.scheduler.member[row]
        assert member is not None
        return member.group

    def _targets(self, draws: Draws) -> NDArray[np.int64]:
        """[D] the row that takes each draw; -1 where a forked sample found none."""
        count = self.rows.draws[draws.source]
        if (count == 1).all():
            return draws.source
        targets, first = draws.source.copy(), np.diff(draws.source, prepend=-1) != 0
        for i in np.flatnonzero((count > 1) & first):
            targets[i : i + count[i]] = self.scheduler.fork(int(draws.source[i]))
        return targets

    def _commit(self, draws: Draws, drawn: Drawn, targets: NDArray[np.int64], version: int) -> None:
        """Appends the draws to their sequences, and ends those that stop."""
        rows, source, tokens = self.rows, draws.source, drawn.tokens
        length = draws.position + 1
        may_stop = length >= rows.min_length[source]
        stopped = may_stop & self.stops.table[rows.stop_set[source], tokens]
        ended = stopped | (length >= rows.limit[source])
        scanned = np.flatnonzero(rows.scans[source])
        told = len(scanned) > 0 or drawn.top is not None or bool(ended.any() or (targets < 0).any())
        owners = self._owners(draws, targets) if told else []
        self._append(drawn, targets, draws.position - rows.prompt_length[source], version)
        for i in scanned:
            found = self._scan(owners[i], int(tokens[i]))
            if found is not None and may_stop[i] and not stopped[i]:
                owners[i].stop_reason, stopped[i], ended[i] = found, True, True
        for draw, alternatives in (drawn.top or {}).items():
            owners[draw].top_logprobs.append(alternatives)
        self._settle(drawn, targets, owners, version)
        self._end(owners, tokens, stopped, ended)

    def _append(self, drawn: Drawn, targets: NDArray[np.int64], column: NDArray[np.int64], version: int) -> None:
        rows = self.rows
        placed = slice(None) if (targets >= 0).all() else targets >= 0
        row, column = targets[placed], column[placed]
        rows.tokens[row, rows.length[row]] = drawn.tokens[placed]
        rows.logprobs[row, column] = drawn.logprobs[placed]
        rows.raw_logprobs[row, column] = drawn.raw_logprobs[placed]
        rows.kept_mass[row, column] = drawn.kept_mass[placed]
        rows.versions[row, column] = version
        rows.length[row] += 1

    def _owners(self, draws: Draws, targets: NDArray[np.int64]) -> list[Member]:
        owners = []
        for source, target, sample in zip(draws.source.tolist(), targets.tolist(), draws.sample.tolist(), strict=True):
            member = self.scheduler.member[target if target >= 0 else source]
            assert member is not None
            owners.append(member if target >= 0 else member.group.members[sample - member.group.first_sample])
        return owners

    def _scan(self, member: Member, token: int) -> str | None:
        if member.scanner is None:
            member.scanner = StopScanner(self.tokenizer, member.group.params.stop)
        return member.scanner.push(token)

    def _settle(self, drawn: Drawn, targets: NDArray[np.int64], owners: list[Member], version: int) -> None:
        """Forked samples without a row keep their first token as a record."""
        for i in np.flatnonzero(targets < 0):
            one = slice(i, i + 1)
            floats = (drawn.logprobs[one].copy(), drawn.raw_logprobs[one].copy(), drawn.kept_mass[one].copy())
            owners[i].record = Record(drawn.tokens[one].copy(), *floats, np.full(1, version, np.int32))

    def _end(self, owners: list[Member], tokens: NDArray[np.int64], stopped: NDArray[np.bool_], ended: NDArray[np.bool_]) -> None:
        for i in np.flatnonzero(ended):
            owners[i].finish_reason = "stop" if stopped[i] else "length"
            if stopped[i] and owners[i].stop_reason is None:
                owners[i].stop_reason = int(tokens[i])
        waiting: dict[int, list[Member]] = {}
        for member in owners:
            if member.row < 0 and not member.finish_reason:
                waiting.setdefault(member.group.index, []).append(member)
        for members in waiting.values():  # before a sibling's blocks are given back
            self.scheduler.wait(members)
        if ended.any():
            self.scheduler.finish([owners[i] for i in np.flatnonzero(ended) if owners[i].row >= 0])
            self.on_finish(int(ended.sum()))
            self._tell_done({owners[i].group.index: owners[i].group for i in np.flatnonzero(ended)}.values())

    def _tell_done(self, groups: Iterable[Group]) -> None:
        for group in groups if self.on_done is not None else ():
            if group.done and group.error is None:
                self.on_done(group)  # type: ignore[misc]

    def _without_failed(self, draws: Draws, drawn: Drawn) -> tuple[Draws, Drawn]:
        """Ends the requests of draws that came to nothing, and leaves their rows out."""
        for i in np.flatnonzero(drawn.tokens < 0).tolist():
            group = self._group_of(int(draws.source[i]))
            group.error = group.error or self._failure(drawn.errors.get(i), group) or self._not_finite(group, draws, i)
        owners = [self._group_of(row) for row in draws.source.tolist()]
        kept = np.array([i for i, group in enumerate(owners) if group.error is None], np.int64)
        for group in {group.index: group for group in owners if group.error is not None}.values():
            self.end(group, "error")
        return draws.cut(kept), drawn.cut(kept)

    def _failure(self, error: Exception | None, group: Group) -> RequestFailedError | None:
        if error is None:
            return None
        failure = RequestFailedError(f"generate: request {group.place}: a logits processor raised {type(error).__name__}: {error}")
        failure.__cause__ = error
        return failure

    def _not_finite(self, group: Group, draws: Draws, i: int) -> NotFiniteError:
        where = f"request {group.place}, sample {int(draws.sample[i])}, position {int(draws.position[i])}"
        return NotFiniteError(f"generate: the logits of {where} hold NaN or +inf, or are all -inf; are the weights finite?")


def finished(groups: list[Group]) -> bool:
    """Whether every sample of every group has ended: our own invariant after a run."""
    return all(group.done for group in groups)
