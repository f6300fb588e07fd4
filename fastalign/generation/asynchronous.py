"""The live engine for event loops: one thread steps it, any number of coroutines submit, read and cancel.

    engine = AsyncEngine(Engine(model, tokenizer))
    async for delta in engine.stream("Once upon a time", SamplingParams(max_tokens=64)):
        print(delta.text, end="")
    await engine.aclose()

The engine belongs to the thread. What others want of it waits in a queue that the thread empties between two steps; what it
draws is handed to each event loop once a step. The thread sleeps while there is nothing to do.

Errors. What is wrong with one request ends that request. An exception of a step ends every request in flight with
EngineFailedError, their blocks are freed, and the engine goes on with the next ones. When even that fails the engine is dead:
requests in flight and all later calls get EngineFailedError.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from fastalign.generation.engine import Engine
from fastalign.generation.params import RequestOutput, SamplingParams
from fastalign.generation.scoring import SequenceScores
from fastalign.generation.stepping import EngineClosedError, EngineFailedError, ScoreJob, SteppingThread
from fastalign.generation.stops import special_ids
from fastalign.generation.streams import Stream, StreamDelta

__all__ = ["AsyncEngine", "EngineClosedError", "EngineFailedError", "EngineFullError", "Stream", "StreamDelta"]

T = TypeVar("T")
Prompt = str | Sequence[int]


class EngineFullError(RuntimeError):
    """As many requests wait as may wait; come again later."""


class AsyncEngine:
    """Owns an engine and the thread that steps it. Made anywhere; used from any number of event loops.

    Args:
        engine: nobody else may use it before `aclose` has returned.
        max_waiting: requests that may be without their first token at any time; further ones are refused. None: any number.
    """

    def __init__(self, engine: Engine, *, max_waiting: int | None = None) -> None:
        if max_waiting is not None and max_waiting < 1:
            raise ValueError(f"AsyncEngine: max_waiting must be >= 1, or None for no limit, got {max_waiting}")
        self.engine, self.max_waiting = engine, max_waiting
        self._special = special_ids(engine.tokenizer)
        self._waiting: set[Stream] = set()
        self._lock = threading.Lock()  # of _waiting and _closing
        self._closing = False
        self._thread = SteppingThread(engine, self._started)

    async def submit(
        self, prompt: Prompt, params: SamplingParams | None = None, *, priority: int = 0, request_id: int | None = None
    ) -> Stream:
        """Gives the engine a prompt, and returns when it has taken it: the stream of its answer, which must be read or closed.

        Args:
            prompt: text or token ids.
            params: how to sample.
            priority: lower values go first.
            request_id: the request part of the random key; None: a fresh one.

        Raises:
            ValueError, TypeError: the engine refuses the prompt or the parameters.
            EngineFullError: `max_waiting` requests are waiting.
            EngineFailedError, EngineClosedError: there is no engine any more.
        """
        params = params or SamplingParams()
        return await self._start(params, lambda: self.engine.add_request(prompt, params, request_id=request_id, priority=priority))

    async def extend(self, request: Any, ids: Sequence[int], params: SamplingParams | None = None, *, priority: int = 0) -> Stream:
        """Lets a finished request go on behind further token ids (`Engine.extend`); raises as `submit`."""
        return await self._start(params or request.params, lambda: self.engine.extend(request, ids, params, priority=priority))

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, priority: int = 0, request_id: int | None = None
    ) -> AsyncIterator[StreamDelta]:
        """The deltas of a prompt's samples as they come. Closing or cancelling the iterator aborts the request.

        Arguments and errors are those of `submit`; the first step of the iteration raises them. What the engine raises later
        ends the iteration with EngineFailedError.
        """
        stream = await self.submit(prompt, params, priority=priority, request_id=request_id)
        try:
            async for delta in stream:
                yield delta
        finally:
            stream.close()

    async def complete(
        self, prompt: Prompt, params: SamplingParams | None = None, *, priority: int = 0, request_id: int | None = None
    ) -> RequestOutput:
        """The finished samples of a prompt. Cancelling it aborts the request. Arguments and errors are those of `submit`.

        Raises:
            RuntimeError: the request ended with an error of its own, besides.
        """
        stream = await self.submit(prompt, params, priority=priority, request_id=request_id)
        try:
            return await stream.result()
        finally:
            stream.close()

    async def score(self, sequences: Sequence[Sequence[int]], *, temperature: float = 1.0, top_logprobs: int = 0) -> list[SequenceScores]:
        """`Engine.score` between two steps; what several callers ask for meanwhile is forwarded together."""
        job = ScoreJob([list(sequence) for sequence in sequences], {"temperature": temperature, "top_logprobs": top_logprobs})
        await self.run(lambda: self._thread.score(job))
        return await asyncio.wrap_future(job.future)

    async def run(self, function: Callable[[], T]) -> T:
        """Calls a function in the engine's thread between two steps: for what else the engine can do.

        Raises:
            EngineFailedError, EngineClosedError: there is no engine any more. Besides, whatever the function raises.
        """
        return await asyncio.wrap_future(self._thread.call(function))

    @asynccontextmanager
    async def updating_weights(self) -> AsyncIterator[None]:
        """Around every change of the weights: the engine stands still, and live requests go on with the new weights."""
        loop = asyncio.get_running_loop()
        standing, left = asyncio.Event(), threading.Event()

        def stand_still() -> None:
            with self.engine.updating_weights():
                loop.call_soon_threadsafe(standing.set)
                left.wait()

        moving, stands = asyncio.ensure_future(self.run(stand_still)), asyncio.ensure_future(standing.wait())
        try:
            await asyncio.wait((moving, stands), return_when=asyncio.FIRST_COMPLETED)
            if moving.done():
                moving.result()  # raises what kept the engine from standing still
            yield
        finally:
            left.set()
            stands.cancel()
            await asyncio.wait((moving,))
        moving.result()

    async def aclose(self, *, drain_seconds: float = 0.0) -> None:
        """Takes no further requests, lets those in flight run for a while, then aborts them and ends the thread.

        Their readers get what there is with the finish_reason "abort". May be called again.
        """
        with self._lock:
            self._closing = True
        loop = asyncio.get_running_loop()
        give_up = loop.time() + drain_seconds
        while self._thread.num_live and loop.time() < give_up:
            await asyncio.sleep(0.01)
        with suppress(EngineClosedError, EngineFailedError):
            self._thread.call(self._thread.leave)
        await asyncio.to_thread(self._thread.join)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    @property
    def failure(self) -> BaseException | None:
        """Why the engine is dead; None while it is not."""
        return self._thread.failure

    @property
    def num_waiting(self) -> int:
        """Requests without their first token."""
        return len(self._waiting)

    @property
    def num_live(self) -> int:
        """Requests in flight, the waiting ones that the engine has taken included."""
        return self._thread.num_live

    async def _start(self, params: SamplingParams, add: Callable[[], Any]) -> Stream:
        stream = Stream(params, self.engine.tokenizer, self._special, self._drop)
        with self._lock:
            if self._closing:
                raise EngineClosedError("the engine was closed, or is about to be")
            if self.max_waiting is not None and len(self._waiting) >= self.max_waiting:
                raise EngineFullError(f"the engine is full: {len(self._waiting)} requests wait for their first token; try again later")
            self._waiting.add(stream)
        try:
            await self.run(lambda: self._thread.take(stream, add))
        except BaseException:
            self._started(stream)
            stream.close()
            raise
        return stream

    def _started(self, stream: Stream) -> None:
        with self._lock:
            self._waiting.discard(stream)

    def _drop(self, stream: Stream) -> None:
        with suppress(EngineClosedError, EngineFailedError):  # then its blocks went with the engine
            self._thread.call(lambda: self._thread.drop(stream))
