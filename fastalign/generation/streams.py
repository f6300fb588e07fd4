"""One request's answer as it comes: filled by the engine's thread, read in an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastalign.generation.params import CompletionOutput, RequestOutput, SamplingParams
from fastalign.generation.text import GrowingText


@dataclass
class StreamDelta:
    """What one sample gained since its last delta.

    Attributes:
        index: which of the request's n samples.
        token_ids: new tokens; they may run ahead of the text, which waits for whole characters.
        text: new text; "" without a tokenizer.
        logprobs, raw_logprobs, top_logprobs: of the new tokens, as in CompletionOutput; None when not asked for.
        finish_reason: "" until the sample's last delta, then as in CompletionOutput.
        stop_reason, error: as in CompletionOutput, with the last delta.
    """

    index: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[float] | None = None
    raw_logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None
    finish_reason: str = ""
    stop_reason: int | str | None = None
    error: str | None = None

    def absorb(self, piece: CompletionOutput) -> None:
        """Adds what came later."""
        self.token_ids += piece.token_ids
        for name in ("logprobs", "raw_logprobs", "top_logprobs"):
            ours, more = getattr(self, name), getattr(piece, name)
            if ours is None:
                setattr(self, name, more)
            else:
                ours += more or []
        self.finish_reason, self.stop_reason, self.error = piece.finish_reason, piece.stop_reason, piece.error


class Stream:
    """Iterates over a request's deltas: `async for delta in stream`.

    What arrives while nobody reads is merged, one delta a sample, so a slow reader costs no more memory than the completion and
    never holds the engine up.

    Attributes:
        params: what was asked for.
        request: the engine's handle, once the engine has taken the request.
        closed: nobody wants it any more.
        quiet: nobody reads it before its end, so that the engine's thread need not hand anything over before.

    Args:
        params: what was asked for.
        tokenizer: for the text of the deltas, or None.
        special: ids without text.
        on_close: called when the reader closes the stream before its end.
    """

    def __init__(self, params: SamplingParams, tokenizer: Any, special: frozenset[int], on_close: Callable[[Stream], None]) -> None:
        self.params, self.closed, self.quiet = params, False, False
        self.request: Any = None
        self.loop = asyncio.get_running_loop()
        self._tokenizer, self._special, self._on_close = tokenizer, special, on_close
        self._texts: dict[int, GrowingText] = {}
        self._waiting: dict[int, StreamDelta] = {}
        self._arrived, self._over = asyncio.Event(), asyncio.Event()
        self._ended = False
        self._failure: BaseException | None = None

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> StreamDelta:
        while not self._waiting:
            if self._failure is not None:
                raise self._failure
            if self._ended or self.closed:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        delta = self._waiting.pop(next(iter(self._waiting)))
        if self._tokenizer is not None:
            delta.text = self._text_of(delta)
        return delta

    async def finished(self) -> None:
        """Waits for the end; what arrived is then there to be read as one delta a sample.

        Raises:
            EngineFailedError, EngineClosedError: the engine did not get there. RuntimeError: the stream was closed before.
        """
        self.quiet = True
        try:
            await self._over.wait()
        finally:
            self.quiet = self._over.is_set()  # given up: what comes is told again
        if self._failure is not None:
            raise self._failure
        if not self._ended:
            raise RuntimeError("the stream was closed before its request had ended")

    async def result(self) -> RequestOutput:
        """Waits for the end, then the whole answer: an alternative to iterating.

        Raises:
            RuntimeError: the request ended with an error of its own. Besides, as `finished`.
        """
        await self.finished()
        output: RequestOutput = self.request.output()
        failed = next((sample.error for sample in output.outputs if sample.finish_reason == "error"), None)
        if failed is not None:
            raise RuntimeError(f"the request ended with an error: {failed}")
        return output

    def close(self) -> None:
        """Ends the request if it runs; the engine frees its blocks before its next step."""
        if not (self.closed or self._ended):
            self.closed = True
            self._arrived.set()
            self._over.set()
            self._on_close(self)

    def receive(self, pieces: list[CompletionOutput], ended: bool) -> None:
        """Takes what a step gave. In the stream's event loop."""
        for piece in pieces:
            self._waiting.setdefault(piece.index, StreamDelta(piece.index)).absorb(piece)
        self._arrived.set()
        if ended:
            self._ended = True
            self._over.set()

    def fail(self, error: BaseException) -> None:
        """Ends the stream with an error, after what has arrived. In the stream's event loop."""
        self._failure, self._ended = error, True
        self._arrived.set()
        self._over.set()

    def _text_of(self, delta: StreamDelta) -> str:
        text = self._texts.get(delta.index)
        if text is None:
            text = self._texts[delta.index] = GrowingText(self._tokenizer, self.params.stop, self._special)
        if not delta.finish_reason:
            return text.push(delta.token_ids)
        text.ids += delta.token_ids
        return text.finish(delta.stop_reason if delta.finish_reason == "stop" else None, self.params.min_tokens)
