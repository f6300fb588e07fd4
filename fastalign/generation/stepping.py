"""The thread that owns a live engine: does what others want of it between two steps, and hands out what each step gave."""

from __future__ import annotations

import logging
import threading
from asyncio import AbstractEventLoop
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

from fastalign.generation.engine import Engine
from fastalign.generation.params import CompletionOutput
from fastalign.generation.scoring import SequenceScores
from fastalign.generation.streams import Stream

log = logging.getLogger("fastalign")


class EngineFailedError(RuntimeError):
    """The engine raised something that is no fault of one request; `__cause__` has it."""


class EngineClosedError(RuntimeError):
    """The engine was closed."""


@dataclass(eq=False)
class ScoreJob:
    """Sequences to score, with the keyword options of `Engine.score`."""

    sequences: list[list[int]]
    options: dict[str, Any]
    future: Future[list[SequenceScores]] = field(default_factory=Future)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.sequences))


class SteppingThread:
    """Steps an engine while it has work and sleeps while it has none.

    Args:
        engine: the thread's alone from now on.
        on_progress: called in the thread with a stream whose request got its first token, or ended, or was dropped.

    Attributes:
        failure: why the engine is dead, or None.
    """

    def __init__(self, engine: Engine, on_progress: Callable[[Stream], None]) -> None:
        self.engine = engine
        self.failure: BaseException | None = None
        self._on_progress = on_progress
        self._commands: SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = SimpleQueue()
        self._lock = threading.Lock()  # nothing is put behind the last command
        self._gone: RuntimeError | None = None
        self._leaving = False
        self._streams: dict[int, Stream] = {}  # by the request's id
        self._scores: list[ScoreJob] = []
        self._thread = threading.Thread(target=self._work, name="fastalign-engine", daemon=True)
        self._thread.start()

    # --- from any thread ---------------------------------------------------------------------------------------------

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Has a function called in the thread between two steps; cancelling the future in time prevents it.

        Raises:
            EngineFailedError, EngineClosedError: the thread has ended.
        """
        future: Future[Any] = Future()
        with self._lock:
            if self._gone is not None:
                raise type(self._gone)(str(self._gone)) from self.failure
            self._commands.put((function, future))
        return future

    @property
    def num_live(self) -> int:
        """Requests in flight."""
        return len(self._streams)

    def join(self) -> None:
        """Waits for the end of the thread."""
        self._thread.join()

    # --- to be called through `call` ---------------------------------------------------------------------------------

    def take(self, stream: Stream, add: Callable[[], Any]) -> None:
        """Starts the request that `add` gives the engine, unless nobody wants it any more."""
        if not stream.closed:
            stream.request = add()
            self._streams[stream.request.id] = stream

    def drop(self, stream: Stream) -> None:
        """Aborts a stream's request if it runs, and frees its blocks; nobody reads what it had."""
        if stream.request is not None and self._streams.pop(stream.request.id, None) is not None:
            self.engine.abort(stream.request)
        self._on_progress(stream)

    def score(self, job: ScoreJob) -> None:
        """Scores the job's sequences before one of the next steps."""
        self._scores.append(job)

    def leave(self) -> None:
        """Aborts what is in flight, whose readers get what there is, and ends the thread."""
        self._leaving = True
        requests = [stream.request for stream in self._streams.values()]
        for request in requests:
            self.engine.abort(request)
        self._deliver(requests)

    # --- the thread --------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while not self._leaving:
                self._obey(wait=not (self.engine.has_work or self._scores))
                if self._scores:
                    self._score_some()
                if self.engine.has_work and not self._leaving:
                    self._step()
        except BaseException as error:
            log.exception("the engine is dead: clearing up after a failed step failed, too")
            self.failure = error
        self._end()

    def _obey(self, *, wait: bool) -> None:
        """Does all that is in the queue, after waiting for something to be there."""
        try:
            while not self._leaving:
                function, future = self._commands.get(wait)
                wait = False
                if not future.set_running_or_notify_cancel():
                    continue
                try:
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(error)
        except Empty:
            pass

    def _step(self) -> None:
        try:
            self._deliver(self.engine.step())
        except Exception as error:
            log.exception("a step of the engine failed; every request in flight ends")
            failure = EngineFailedError(f"the engine failed in a step: {type(error).__name__}: {error}")
            failure.__cause__ = error
            self._fail(failure)
            if self.engine.has_work:
                raise RuntimeError("the engine has work left after all its requests were aborted") from error

    def _fail(self, failure: BaseException) -> None:
        """Ends all that is in flight with an error."""
        streams = list(self._streams.values())
        self._streams.clear()
        for stream in streams:
            self._on_progress(stream)
            _send(stream.loop, lambda stream=stream: stream.fail(failure))  # type: ignore[misc]
        for stream in streams:
            self.engine.abort(stream.request)

    def _deliver(self, requests: Iterable[Any]) -> None:
        """Hands each event loop what its requests gained, all at once."""
        batches: dict[AbstractEventLoop, list[tuple[Stream, list[CompletionOutput], bool]]] = defaultdict(list)
        for request in requests:
            stream = self._streams.get(request.id)
            if stream is None:
                continue
            self._on_progress(stream)
            if request.finished or not stream.quiet:
                batches[stream.loop].append((stream, request.new_outputs(), request.finished))
            if request.finished:
                del self._streams[request.id]
        for loop, batch in batches.items():
            if not _send(loop, lambda batch=batch: _hand_over(batch)):  # type: ignore[misc]
                for stream, _, _ in batch:  # its readers are gone with their loop
                    self.drop(stream)

    def _score_some(self) -> None:
        """Scores waiting jobs of equal options together, about one step's tokens of them; alone where one of them is refused."""
        first, budget = self._scores[0], self.engine.max_num_batched_tokens
        jobs: list[ScoreJob] = []
        for job in self._scores:
            if job is first or (job.options == first.options and job.num_tokens <= budget):
                jobs.append(job)
                budget -= job.num_tokens
        self._scores = [job for job in self._scores if job not in jobs]
        jobs = [job for job in jobs if job.future.set_running_or_notify_cancel()]
        try:
            scores = self.engine.score([sequence for job in jobs for sequence in job.sequences], **first.options)
        except Exception as error:
            for job in jobs:
                self._score_alone(job, error if len(jobs) == 1 else None)
            return
        at = 0
        for job in jobs:
            job.future.set_result(scores[at : at + len(job.sequences)])
            at += len(job.sequences)

    def _score_alone(self, job: ScoreJob, error: Exception | None) -> None:
        try:
            if error is not None:
                raise error
            job.future.set_result(self.engine.score(job.sequences, **job.options))
        except Exception as own:
            job.future.set_exception(own)

    def _end(self) -> None:
        """Nothing is done from here on: says so to everybody who waits."""
        dead = self.failure is not None
        why = EngineFailedError(f"the engine is dead: {self.failure}") if dead else EngineClosedError("the engine was closed")
        why.__cause__ = self.failure
        with self._lock:
            self._gone = why
        for stream in self._streams.values():
            self._on_progress(stream)
            _send(stream.loop, lambda stream=stream: stream.fail(why))  # type: ignore[misc]
        self._streams = {}
        waiting = [job.future for job in self._scores]
        while not self._commands.empty():
            waiting.append(self._commands.get_nowait()[1])
        for future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(why)


def _hand_over(batch: list[tuple[Stream, list[CompletionOutput], bool]]) -> None:
    for stream, pieces, ended in batch:
        stream.receive(pieces, ended)


def _send(loop: AbstractEventLoop, callback: Callable[[], None]) -> bool:
    """Has an event loop call something; False when it is closed."""
    try:
        loop.call_soon_threadsafe(callback)
    except RuntimeError:
        return False
    return True
