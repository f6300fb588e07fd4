"""Rewards of completions as they come, in threads beside whatever writes the others.

Only of rewards that judge each sample alone: a function that may look at its whole batch is called once, with all of it. So the
values are those of one call with everything, and so is what a failing sample costs; which samples share a call is left open.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .isolation import MAX_HUNG, Hangs

if TYPE_CHECKING:
    from .reward_set import Prompt, Reward, RewardSet

Arguments = dict[str, list[Any]]


def part_of(batch: Arguments, signature: dict[str, Any], at: Iterable[int] | None = None) -> Arguments:
    """Of a batch what a function takes, at some places (None: all)."""
    taken = {name: values for name, values in batch.items() if signature["any"] or name in signature["names"]}
    if at is None:
        return taken
    rows = list(at)
    return {name: [values[i] for i in rows] for name, values in taken.items()}


@dataclass(frozen=True)
class _Part:
    places: list[int]
    prompts: list[Any]
    arguments: Arguments


class _Lane:
    """One reward's calls: as many at a time as it has workers, each with all that waits, shared fairly among the free ones."""

    def __init__(self, reward: Reward, timeout: float) -> None:
        self.reward, self.timeout = reward, timeout
        self.shards = reward.isolated.caller.shards
        self.found: dict[int, float] = {}  # by place
        self.calls: list[tuple[float, float]] = []  # when each began and ended
        self._hangs = Hangs(MAX_HUNG * self.shards)
        self._waiting: deque[_Part] = deque()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(self.shards, thread_name_prefix="fastalign-reward")
        self._jobs: list[Future[None]] = []

    def add(self, part: _Part) -> None:
        self._waiting.append(part)
        self._jobs.append(self._pool.submit(self._call))  # one a part, so none is left; some find nothing

    def join(self) -> None:
        for job in self._jobs:
            job.result()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _call(self) -> None:
        with self._lock:
            parts = [self._waiting.popleft() for _ in range(-(-len(self._waiting) // self.shards))]
        if not parts:
            return
        began = time.perf_counter()
        places = [place for part in parts for place in part.places]
        prompts = [prompt for part in parts for prompt in part.prompts]
        arguments = {name: [value for part in parts for value in part.arguments[name]] for name in parts[0].arguments}
        values = self.reward.isolated.score_part(arguments, prompts, self.timeout, places, self._hangs)
        self.found.update(zip(places, values, strict=True))
        self.calls.append((began, time.perf_counter()))


class EarlyScoring:
    """A batch of completions that is scored while it grows; made by `RewardSet.begin`.

    Args:
        rewards: the set.
        alone: those of it that judge each sample alone.
        timeout: seconds that one sample may take.
    """

    def __init__(self, rewards: RewardSet, alone: Sequence[Reward], timeout: float) -> None:
        self._rewards = rewards
        self._lanes = {reward.name: _Lane(reward, timeout) for reward in alone}
        self._added: set[int] = set()
        self._finished = 0.0

    @property
    def begins(self) -> bool:
        """Whether `add` begins with anything."""
        return bool(self._lanes)

    def add(
        self,
        places: Sequence[int],
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] | None = None,
        columns: dict[str, list[Any]] | None = None,
    ) -> None:
        """Begins with some samples of the batch; returns at once.

        Args:
            places: [B] where they are in the batch.
            prompts, completions, completion_ids, columns: theirs, as `RewardSet.score` takes them; the columns are the batch's, with
                None where a record has not one.

        Raises:
            ValueError: as `RewardSet.score`.
        """
        self._begin(list(places), self._rewards.batch(prompts, completions, completion_ids, columns), list(range(len(places))))

    def finish(self, batch: Arguments) -> list[str]:
        """Begins with what of the batch has not been added; the names of the rewards whose `values` are coming."""
        self._finished = time.perf_counter()
        missing = [i for i in range(len(batch["prompts"])) if i not in self._added]
        if missing:
            self._begin(missing, batch, missing)
        return list(self._lanes)

    def values(self, name: str, count: int) -> list[float]:
        """[count] rewards of the batch, waited for; NaN where missing."""
        lane = self._lanes[name]
        lane.join()
        values = [lane.found[place] for place in range(count)]
        lane.reward.isolated.look(values)
        return values

    @property
    def seconds(self) -> float:
        """Seconds of calls, added up, that had passed when the batch was complete: what nobody waited for."""
        return sum(max(0.0, min(end, self._finished) - began) for lane in self._lanes.values() for began, end in lane.calls)

    def close(self) -> None:
        """Drops what has not begun."""
        for lane in self._lanes.values():
            lane.close()

    def __enter__(self) -> EarlyScoring:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _begin(self, places: list[int], batch: Arguments, at: list[int]) -> None:
        self._added.update(places)
        prompts = [batch["prompts"][i] for i in at]
        for lane in self._lanes.values():
            lane.add(_Part(places, prompts, part_of(batch, lane.reward.signature, at)))
