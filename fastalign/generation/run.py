"""The live sequences and what moves them: one step forwards a plan, draws, and ends what has ended."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastalign.generation.groups import Group, Member
from fastalign.generation.params import NotFiniteError, RequestFailedError
from fastalign.generation.rows import Record, Rows
from fastalign.generation.runner import Runner
from fastalign.generation.sampler import Drawn, Draws, Sampler
from fastalign.generation.scheduler import Scheduler
from fastalign.generation.stops import StopScanner, StopTable

Ended = Callable[[int], object]
Done = Callable[[Group], object]


class Run:
    """Puts scheduler, runner and sampler together.

    Args:
        rows, scheduler, runner, sampler, stops: of these sequences.
        tokenizer: for stop strings.
        version: the weight version that is recorded with every token.

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
        on_finish: Ended = lambda _: None,
    ) -> None:
        self.rows, self.scheduler, self.runner, self.sampler, self.stops = rows, scheduler, runner, sampler, stops
        self.tokenizer, self.version, self.on_finish = tokenizer, version, on_finish
        self.on_done: Done | None = None
        self.tracks = False
        self.touched: dict[int, Group] = {}

    def step(self) -> None:
        """Forwards one plan and draws for the sequences whose known tokens are all in the cache."""
        self.touched = {}
        plan = self.scheduler.schedule()
        hidden = self.runner.forward(plan)
        at = self.scheduler.advance(plan)
        if not len(at):
            return
        drawing = plan.rows[at]
        draws = Draws.of(self.rows, drawing)
        drawn = self.sampler.draw(self.runner.select(hidden, at), draws, self.runner.keep_logits(plan, at))
        if (drawn.tokens < 0).any():
            drawing, draws, drawn = self._without_failed(drawing, draws, drawn)
        if self.tracks:
            for row in drawing.tolist():
                self._touch(self._group_of(row))
        self.scheduler.stats.decoded_tokens += len(drawn.tokens)
        self._commit(draws, drawn, self._targets(draws, drawing))

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

    def _targets(self, draws: Draws, drawing: NDArray[np.int64]) -> NDArray[np.int64]:
        """[D] the row that takes each draw; -1 where a forked sample found none."""
        if len(draws.source) == len(drawing):
            return draws.source
        targets = draws.source.copy()
        count = self.rows.draws[drawing]
        first = np.cumsum(count) - count
        for i in np.flatnonzero(count > 1):
            targets[first[i] : first[i] + count[i]] = self.scheduler.fork(int(drawing[i]))
        return targets

    def _commit(self, draws: Draws, drawn: Drawn, targets: NDArray[np.int64]) -> None:
        """Appends the draws to their sequences, and ends those that stop."""
        rows, source, tokens = self.rows, draws.source, drawn.tokens
        length = draws.position + 1
        may_stop = length >= rows.min_length[source]
        stopped = may_stop & self.stops.table[rows.stop_set[source], tokens]
        ended = stopped | (length >= rows.limit[source])
        scanned = np.flatnonzero(rows.scans[source])
        told = len(scanned) > 0 or drawn.top is not None or bool(ended.any() or (targets < 0).any())
        owners = self._owners(draws, targets) if told else []
        self._append(drawn, targets, draws.position - rows.prompt_length[source])
        for i in scanned:
            found = self._scan(owners[i], int(tokens[i]))
            if found is not None and may_stop[i] and not stopped[i]:
                owners[i].stop_reason, stopped[i], ended[i] = found, True, True
        for draw, alternatives in (drawn.top or {}).items():
            owners[draw].top_logprobs.append(alternatives)
        self._settle(draws, drawn, targets, owners)
        self._end(owners, tokens, stopped, ended)

    def _append(self, drawn: Drawn, targets: NDArray[np.int64], column: NDArray[np.int64]) -> None:
        rows = self.rows
        placed = slice(None) if (targets >= 0).all() else targets >= 0
        row, column = targets[placed], column[placed]
        rows.tokens[row, rows.length[row]] = drawn.tokens[placed]
        rows.logprobs[row, column] = drawn.logprobs[placed]
        rows.raw_logprobs[row, column] = drawn.raw_logprobs[placed]
        rows.kept_mass[row, column] = drawn.kept_mass[placed]
        rows.versions[row, column] = self.version
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

    def _settle(self, draws: Draws, drawn: Drawn, targets: NDArray[np.int64], owners: list[Member]) -> None:
        """Forked samples without a row keep their first token as a record."""
        for i in np.flatnonzero(targets < 0):
            one = slice(i, i + 1)
            floats = (drawn.logprobs[one].copy(), drawn.raw_logprobs[one].copy(), drawn.kept_mass[one].copy())
            owners[i].record = Record(drawn.tokens[one].copy(), *floats, np.full(1, self.version, np.int32))

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

    def _without_failed(self, drawing: NDArray[np.int64], draws: Draws, drawn: Drawn) -> tuple[NDArray[np.int64], Draws, Drawn]:
        """Ends the requests of draws that came to nothing, and leaves their rows out."""
        for i in np.flatnonzero(drawn.tokens < 0).tolist():
            group = self._group_of(int(draws.source[i]))
            group.error = group.error or self._failure(drawn.errors.get(i), group) or self._not_finite(group, draws, i)
        failed = np.array([self._group_of(row).error is not None for row in drawing.tolist()])
        groups = {group.index: group for group in map(self._group_of, drawing[failed].tolist())}
        kept = np.flatnonzero(~failed[draws.at])
        for group in groups.values():
            self.end(group, "error")
        return drawing[~failed], draws.cut(kept), drawn.cut(kept)

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
