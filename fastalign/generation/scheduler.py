"""Who runs in the next step, and in which blocks.

The group is the unit: a prompt is forwarded once, then its n samples fork and share its blocks by reference. Every step
mixes decoding and chunks of prompts under one token budget. A sequence is admitted when the blocks that it needs now are
free; when they run out, the youngest sequence of the least urgent group gives its blocks back, keeps what it has drawn, and is
recomputed later. What was computed stays findable by its token ids until the room is needed or the weights change.
"""

from __future__ import annotations

import heapq

import numpy as np

from fastalign.generation.blocks import BlockPool, Blocks
from fastalign.generation.groups import Group, Member
from fastalign.generation.params import Stats
from fastalign.generation.plan import Ints, Plan, share
from fastalign.generation.prefixes import PrefixCache
from fastalign.generation.rows import Rows


class Scheduler:
    """Places groups in rows and blocks, and picks each step's tokens.

    Args:
        pool: the blocks, all free.
        rows: the live sequences' columns.
        max_num_batched_tokens: tokens of one step; at least the number of rows, so that all can decode.
        stats: counted into.
        root: of the prefix cache.
    """

    def __init__(self, pool: BlockPool, rows: Rows, max_num_batched_tokens: int, stats: Stats, root: bytes | None = None) -> None:
        assert max_num_batched_tokens >= rows.num_rows
        self.prefixes = PrefixCache(pool, root)
        self.pool, self.rows, self.stats, self.max_num_batched_tokens = pool, rows, stats, max_num_batched_tokens
        self.active: Ints = np.empty(0, np.int64)  # rows in use, oldest first
        self.member: list[Member | None] = [None] * rows.num_rows
        self._free_rows = list(range(rows.num_rows))[::-1]
        self._queue: list[tuple[tuple[int, int], Group]] = []  # groups with waiting members
        self._holds: dict[tuple[int, int], Group] = {}

    @property
    def busy(self) -> bool:
        """Whether anything is left to do."""
        return bool(self._queue) or self.active.size > 0

    def add(self, group: Group) -> None:
        """Queues a group; groups with a lower rank go first."""
        heapq.heappush(self._queue, (group.rank, group))

    def schedule(self) -> Plan:
        """Admits what fits, and picks the step's tokens and blocks: none when the last tokens of all that runs are being drawn."""
        self._admit()
        rows, counts = share(self.active, self.rows.pending(self.active), self.max_num_batched_tokens)
        rows, counts = self._make_room(rows, counts)
        starts = self.rows.computed[rows]
        return Plan(rows, starts, counts, self._reserve(rows, starts))

    # --- admission ---------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        pending = int(self.rows.pending(self.active).sum())
        placed: list[int] = []
        while self._queue and pending < self.max_num_batched_tokens:
            group = self._queue[0][1]
            if not self._free_rows and (placed or not self._yields_to(group)):
                break
            member = group.waiting[-1]
            if not self._place(member):
                if not placed and self._yields_to(group):
                    continue
                if self.active.size or placed or not self._holds:
                    break
                self._drop_hold(self._holds[max(self._holds)])  # nothing runs: what is held must make way
                continue
            placed.append(member.row)
            pending += int(self.rows.length[member.row] - self.rows.computed[member.row])
            group.waiting.pop()
            if not group.waiting:
                heapq.heappop(self._queue)
                self._drop_hold(group)
        if placed:
            self._activate(np.array(placed, np.int64))

    def _yields_to(self, group: Group) -> bool:
        """Preempts the youngest running sequence when it is less urgent than `group`; whether it was."""
        if not self.active.size:
            return False
        youngest = self.member[int(self.active[-1])]
        assert youngest is not None
        if youngest.group.priority <= group.priority:
            return False
        self._preempt(youngest)
        return True

    def _place(self, member: Member) -> bool:
        """Gives a waiting member a row and the blocks of all its known tokens; False when it must wait."""
        group, pool, rows = member.group, self.pool, self.rows
        shared = self._shared_prompt(group)
        if shared is None:
            return False
        known = self.prefixes.find(np.concatenate([group.prompt, member.record.tokens]))
        blocks, start = max(shared, known, key=lambda prefix: prefix[1])
        length = len(group.prompt) + len(member.record.tokens)
        fresh = pool.blocks_for(length) - len(blocks)
        revived = int((pool.references[blocks] == 0).sum())  # they count as free until they are held
        headroom = 1 + len(self.active) // 2 if self.active.size else 0  # what the running ones may ask for in the next steps
        if fresh + revived + (start % pool.block_size > 0) + headroom > pool.num_free:
            return False
        row = member.row = self._free_rows.pop()
        self.member[row] = member
        rows.fill(row, group.prompt, member.record, group.spec(member))
        rows.computed[row], rows.high_water[row] = start, member.high_water
        self.stats.cached_tokens += start if start > shared[1] else 0
        pool.retain(blocks)
        rows.num_blocks[row] = len(blocks) + fresh
        rows.table[row, : len(blocks)] = blocks
        rows.table[row, len(blocks) : len(blocks) + fresh] = pool.allocate(fresh)
        return True

    def _shared_prompt(self, group: Group) -> tuple[Blocks, int] | None:
        """(blocks, tokens) of the prompt that are in the cache; None while a sibling is computing it."""
        if group.hold is not None:
            return group.hold, len(group.prompt)
        full = len(group.prompt) // self.pool.block_size
        for sibling in group.members:
            if sibling.row >= 0 and full > 0:
                if self.rows.computed[sibling.row] < full * self.pool.block_size:
                    return None
                return self.rows.table[sibling.row, :full].copy(), full * self.pool.block_size
        return np.empty(0, np.int32), 0

    def _publish(self, row: int) -> None:
        self.prefixes.publish(self.rows.tokens[row, : min(self.rows.computed[row], self.rows.length[row])], self.rows.blocks(row))

    def _activate(self, rows: Ints) -> None:
        active = np.concatenate([self.active, rows])
        self.active = active[np.lexsort((self.rows.order[active], self.rows.priority[active]))]

    # --- the step's tokens -------------------------------------------------------------------------------------------

    def _blocks_wanted(self, rows: Ints) -> tuple[Ints, Ints]:
        """([S] new blocks at the end, [S] indices into `rows` whose first written block is shared and must be copied)."""
        size, columns = self.pool.block_size, self.rows
        grow = -(-columns.expected[rows] // size) - columns.num_blocks[rows]
        at = columns.computed[rows] // size
        inside = np.flatnonzero(at < columns.num_blocks[rows])
        shared = self.pool.references[columns.table[rows[inside], at[inside]]] > 1
        return grow, inside[shared]

    def _make_room(self, rows: Ints, counts: Ints) -> tuple[Ints, Ints]:
        """Preempts, youngest first, until the blocks that `rows` want are free; returns the rows that are left."""
        while True:
            grow, copied = self._blocks_wanted(rows)
            if int(grow.sum()) + len(copied) <= self.pool.num_free:
                return rows, counts
            keep = rows != self._reclaim()
            rows, counts = rows[keep], counts[keep]

    def _reclaim(self) -> int:
        """Takes back the blocks of the youngest sequence, or of the youngest group's held prompt; the row that lost, or -1."""
        youngest = int(self.active[-1])
        member = self.member[youngest]
        assert member is not None
        held = max(self._holds, default=None)
        if held is not None and (held > member.group.rank or self.active.size == 1):
            self._drop_hold(self._holds[held])
            return -1
        assert self.active.size > 1, "one sequence must fit the cache: the engine checks it before it starts"
        self._preempt(member)
        return youngest

    def _preempt(self, member: Member) -> None:
        group = member.group
        member.record = self.rows.record(member.row)
        member.high_water = int(max(self.rows.computed[member.row], self.rows.high_water[member.row]))
        self._publish(member.row)
        self._vacate([member])
        if not group.waiting:
            heapq.heappush(self._queue, (group.rank, group))
        group.waiting.append(member)
        group.waiting.sort(key=lambda m: -m.index)
        self.stats.preemptions += 1

    def _reserve(self, rows: Ints, starts: Ints) -> tuple[Blocks, Blocks]:
        """Takes the blocks that `rows` want; returns what to copy."""
        grow, copied = self._blocks_wanted(rows)
        columns = self.rows
        if grow.any():
            growing = np.repeat(rows, grow)
            first = np.repeat(np.cumsum(grow) - grow, grow)
            columns.table[growing, columns.num_blocks[growing] + np.arange(len(growing)) - first] = self.pool.allocate(len(growing))
            columns.num_blocks[rows] += grow
        if not len(copied):
            return np.empty(0, np.int32), np.empty(0, np.int32)
        at = starts[copied] // self.pool.block_size
        sources = columns.table[rows[copied], at]
        targets = self.pool.allocate(len(copied))
        columns.table[rows[copied], at] = targets
        self.pool.release(sources)
        self.stats.copied_blocks += len(copied)
        return sources, targets

    # --- after the step ----------------------------------------------------------------------------------------------

    def advance(self, plan: Plan) -> Ints:
        """Notes that the plan's tokens are in the cache; returns [K] indices into plan.rows of sequences that draw now."""
        columns, rows = self.rows, plan.rows
        ends = plan.starts + plan.counts
        known = np.maximum(plan.starts, columns.high_water[rows])
        first_time = np.maximum(ends - known, 0)
        self.stats.prompt_tokens += int(np.maximum(np.minimum(ends, columns.prompt_length[rows]) - known, 0).sum())
        self.stats.recomputed_tokens += int((plan.counts - first_time).sum())
        self.stats.steps += 1
        columns.computed[rows] = ends
        columns.high_water[rows] = np.maximum(columns.high_water[rows], ends)
        prompts = columns.prompt_length[rows]
        for row in rows[(plan.starts < prompts) & (ends >= prompts)].tolist():
            self._publish(row)
        return np.flatnonzero(ends == columns.expected[rows])

    def fork(self, row: int) -> Ints:
        """Makes n samples of the prompt in `row`; returns their rows, -1 where none was free (those wait)."""
        leader = self.member[row]
        assert leader is not None
        group = leader.group
        group.members.extend(Member(group, j, high_water=len(group.prompt)) for j in range(1, group.params.n))
        targets = np.full(group.params.n, -1, np.int64)
        targets[0] = row
        self.rows.draws[row] = 1
        for member in group.members[1 : 1 + len(self._free_rows)]:
            target = member.row = self._free_rows.pop()
            targets[member.index] = target
            self.member[target] = member
            self.rows.copy_prompt(row, target)
            spec = group.spec(member)
            self.rows.sample[target], self.rows.order[target] = spec.sample, spec.order
        started = targets[targets >= 0]
        if len(started) > 1:
            self.pool.retain(self.rows.blocks(row), len(started) - 1)
            self._activate(started[1:])
        return targets

    def wait(self, members: list[Member]) -> None:
        """Queues freshly forked members of one group that found no row, and holds the prompt's blocks for them."""
        group = members[0].group
        group.waiting = sorted(members, key=lambda m: -m.index)
        group.hold = self.rows.blocks(group.members[0].row).copy()
        self.pool.retain(group.hold)
        self._holds[group.rank] = group
        heapq.heappush(self._queue, (group.rank, group))

    def finish(self, members: list[Member]) -> None:
        """Ends running members: their records are kept, their rows and blocks are given back."""
        for member in members:
            member.record = self.rows.record(member.row)
            if member.group.live:  # what nobody goes on with would only keep warm blocks from use
                self._publish(member.row)
        self._vacate(members)

    def cancel(self, group: Group) -> list[Member]:
        """Takes a group out, running or waiting; its unfinished members keep their records. Returns them, n before the fork, too."""
        if not group.forked:
            group.members.extend(Member(group, j) for j in range(1, group.params.n))
        ended = list(group.unfinished())
        self.finish([member for member in ended if member.row >= 0])
        if group.waiting:
            group.waiting.clear()
            self._queue = [entry for entry in self._queue if entry[1] is not group]
            heapq.heapify(self._queue)
        self._drop_hold(group)
        return ended

    def restart(self, root: bytes | None) -> None:
        """After an update of the weights: what was computed is void, so that every live sequence is forwarded anew."""
        for row in self.active[::-1].tolist():
            member = self.member[row]
            assert member is not None
            self._preempt(member)
        for group in list(self._holds.values()):
            self._drop_hold(group)
        self.prefixes.clear(root)

    def _vacate(self, members: list[Member]) -> None:
        vacated = [member.row for member in members]
        for row, member in zip(vacated, members, strict=True):
            self.pool.release(self.rows.blocks(row))
            self.rows.num_blocks[row] = 0
            self.rows.tenant[row] += 1
            member.row, self.member[row] = -1, None
        self._free_rows.extend(vacated)
        self.active = self.active[~np.isin(self.active, vacated)]

    def _drop_hold(self, group: Group) -> None:
        if group.hold is not None:
            self.pool.release(group.hold)
            group.hold = None
            del self._holds[group.rank]
