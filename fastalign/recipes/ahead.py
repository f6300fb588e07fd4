"""The next step's rollout, collected in a thread of its own over a copy of the weights while this step's update runs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..generation import Engine
from ..models.copies import ModelCopy
from ..rollout import Rollout
from .saved_rollouts import packed_rollout, unpacked_rollout


class ClosedError(RuntimeError):
    """The rollout is not wanted any more."""


@dataclass(frozen=True)
class Collected:
    """A rollout with its rewards, and what is told of how it came.

    Attributes:
        rollout: of the groups that a step learns from.
        epoch: how far the order of the data was behind it.
        timing: seconds by name.
    """

    rollout: Rollout
    epoch: float
    timing: dict[str, float]


class Ahead:
    """Rollouts that are one step ahead: that of step t + 1 is sampled from the weights before update t, while update t runs.

    The schedule is fixed, whatever takes longer, so that runs repeat: `take` waits for the rollout of its step, copies the weights as
    they are and begins the next one. Only the first step's is sampled from the weights that it updates.

    Args:
        copy: of the policy; nobody else reads it.
        engine: over the copy; the thread's alone while a rollout is in flight.
        live: the engine over the policy itself, which counts its versions.
        num_steps: of the run: behind the last one nothing is begun.
    """

    def __init__(self, copy: ModelCopy, engine: Engine, live: Engine, num_steps: int) -> None:
        self.copy, self.engine, self.live, self.num_steps = copy, engine, live, num_steps
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="fastalign-rollout", initializer=self._as_here)
        self._flight: Future[Collected] | None = None
        self._closed = False

    def take(self, index: int, collect: Callable[[], Collected]) -> Collected:
        """The rollout of a step (from 0); that of the next is in flight when this returns."""
        if self._flight is None:
            self._begin(collect)
        self.settle()
        assert self._flight is not None
        found, self._flight = self._flight.result(), None
        if index + 1 < self.num_steps:
            self._begin(collect)
        return found

    def settle(self) -> None:
        """Waits until nothing is being sampled; raises what the thread raised."""
        if self._flight is not None:
            self._flight.result()

    def still_wanted(self, count: int = 0) -> None:
        """For the thread, whenever samples have ended. Raises ClosedError after `close`."""
        if self._closed:
            raise ClosedError("the run has ended")

    def lag(self, rollout: Rollout) -> float:
        """By how many versions of the weights a rollout is behind the policy, on average over its tokens."""
        versions = [version for sample in rollout.flat for version in sample.weight_versions or ()]
        return self.live.weight_version - sum(versions) / len(versions) if versions else 0.0

    def state_dict(self) -> dict[str, Any]:
        """What a run goes on from, as JSON values: the rollout in flight, waited for, since its weights are gone by then."""
        self.settle()
        batch = None if self._flight is None else self._flight.result()
        saved = None if batch is None else asdict(replace(batch, rollout=Rollout([], []))) | {"rollout": packed_rollout(batch.rollout)}
        return {"weight_version": self.live.weight_version, "batch": saved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` returned."""
        self.live.weight_version, saved = state["weight_version"], state["batch"]
        if saved is not None:
            self._flight = Future()
            self._flight.set_result(Collected(**saved | {"rollout": unpacked_rollout(saved["rollout"])}))

    def close(self) -> None:
        """Breaks off what is in flight when its next sample ends, and ends the thread."""
        self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _begin(self, collect: Callable[[], Collected]) -> None:
        with self.engine.updating_weights():
            self.copy.refresh()
        self.engine.weight_version = self.live.weight_version
        self._flight = self._pool.submit(self._run, collect)

    def _run(self, collect: Callable[[], Collected]) -> Collected:
        with torch.cuda.device(self.copy.device) if self.copy.device.type == "cuda" else nullcontext():
            return collect()

    def _as_here(self) -> None:
        torch.set_num_threads(self._threads)  # OpenMP counts a thread's threads by thread
