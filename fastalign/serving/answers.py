"""From a request to its answer: submits the prompts, reads their streams, writes one object or many chunks."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi.responses import JSONResponse, Response
from starlette.types import Receive

from fastalign.generation.params import SamplingParams
from fastalign.generation.streams import Stream, StreamDelta
from fastalign.serving.choices import ChatChoice, Choice, CompletionChoice
from fastalign.serving.connection import CLIENT_GONE, ClientGoneError, EventStream, while_connected
from fastalign.serving.errors import ApiError, refusing
from fastalign.serving.protocol import ChatRequest, CompletionRequest, GenerationRequest
from fastalign.serving.sampling import sampling_params
from fastalign.serving.service import PromptIds, Service

DEFAULT_COMPLETION = 16  # max_tokens of /v1/completions when none is given, as OpenAI has it


@dataclass(frozen=True)
class Work:
    """What a request asks the engine for.

    Attributes:
        request: as it came.
        kind: "text_completion" or "chat.completion".
        prompts: and for each of them its parameters; None: nothing is to be drawn.
        choices: prompt by prompt, n each.
    """

    request: CompletionRequest | ChatRequest
    kind: str
    prompts: list[PromptIds]
    params: list[SamplingParams | None]
    choices: list[Choice]


async def completion_work(service: Service, request: CompletionRequest) -> Work:
    """Reads a request to /v1/completions. Raises ApiError for what is wrong with it."""
    prompts = [service.completion_prompt(prompt) for prompt in request.prompt]
    wanted = DEFAULT_COMPLETION if request.max_tokens is None else request.max_tokens
    params = [_params(service, request, prompt, wanted, "prompt", request.logprobs) for prompt in prompts]
    scores: list[Any] = [None] * len(prompts)
    if request.echo and request.logprobs is not None:
        with refusing():
            scores = list(await service.engine.score([prompt.ids for prompt in prompts], top_logprobs=request.logprobs))
    choices: list[Choice] = []
    for prompt, score in zip(prompts, scores, strict=True):
        for _ in range(request.n or 1):
            options = {"echo": bool(request.echo), "scores": score, "top": request.logprobs}
            choices.append(CompletionChoice(service, len(choices), prompt, **options))
    return Work(request, "text_completion", prompts, params, choices)


async def chat_work(service: Service, request: ChatRequest) -> Work:
    """Reads a request to /v1/chat/completions. Raises ApiError for what is wrong with it."""
    prompt = service.chat_prompt(request.messages, request.chat_template_kwargs)
    wanted = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    top = (request.top_logprobs or 0) if request.logprobs else None
    choices: list[Choice] = [ChatChoice(service, index, top=top) for index in range(request.n or 1)]
    return Work(request, "chat.completion", [prompt], [_params(service, request, prompt, wanted, "messages", top)], choices)


def _params(
    service: Service, request: GenerationRequest, prompt: PromptIds, wanted: int | None, param: str, top: int | None
) -> SamplingParams | None:
    if wanted == 0:
        return None
    service.check_length(prompt, param)
    options = {"logprobs": top is not None, "top_logprobs": top or 0, "vocab_size": service.limits.vocab_size}
    with refusing():
        return sampling_params(request, prompt_tokens=len(prompt.ids), max_tokens=service.room(prompt, wanted), **options)  # type: ignore[arg-type]


async def answer(service: Service, work: Work, receive: Receive) -> Response:
    """The response: an object, or a stream of events. The requests are aborted when the client goes away."""
    streams = await _submit(service, work)
    writer = _Writer(service, work)
    if work.request.stream:
        return EventStream(_chunks(writer, streams))
    try:
        return JSONResponse(await while_connected(receive, _whole(writer, streams)))
    except ClientGoneError:
        return Response(status_code=CLIENT_GONE)
    finally:
        _close(streams)


async def _submit(service: Service, work: Work) -> list[Stream]:
    """Starts all prompts of a request, or none of them."""
    # With a seed a request repeats: prompt i of it draws with the key (seed, i), as in Engine.generate.
    waiting, most = sum(params is not None for params in work.params), service.engine.max_waiting
    if most is not None and waiting > most:
        raise ApiError(f"prompt: expected at most {most} prompts, as many as may wait at a time, got {waiting}", param="prompt")
    seeded, priority = work.request.seed is not None, work.request.priority or 0
    asked = [
        service.engine.submit(prompt.ids, params, priority=priority, request_id=i if seeded else None)
        for i, (prompt, params) in enumerate(zip(work.prompts, work.params, strict=True))
        if params is not None
    ]
    given = await asyncio.gather(*asked, return_exceptions=True)
    errors = [error for error in given if isinstance(error, BaseException)]
    if errors:
        _close([stream for stream in given if isinstance(stream, Stream)])
        with refusing():
            raise errors[0]
    return [stream for stream in given if isinstance(stream, Stream)]


def _close(streams: Sequence[Stream]) -> None:
    for stream in streams:
        stream.close()


class _Writer:
    """Writes one request's answer and counts its tokens."""

    def __init__(self, service: Service, work: Work) -> None:
        self.service, self.work = service, work
        prefix = "cmpl" if work.kind == "text_completion" else "chatcmpl"
        self.head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}
        self.prompt_tokens = sum(len(prompt.ids) for prompt in work.prompts)
        self.completion_tokens = 0
        self._opened: set[int] = set()
        service.counts["prompt_tokens_total"] += self.prompt_tokens

    @property
    def drawing(self) -> bool:
        """Whether anything is to be drawn."""
        return any(params is not None for params in self.work.params)

    def piece(self, prompt: int, delta: StreamDelta) -> dict[str, Any]:
        """A delta of one prompt's stream as a choice.

        Raises:
            ApiError: the sample ended with an error.
        """
        if delta.finish_reason == "error":
            raise ApiError(f"generation failed: {delta.error}", status=500, code="generation_failed")
        self.completion_tokens += len(delta.token_ids)
        self.service.counts["completion_tokens_total"] += len(delta.token_ids)
        index = prompt * (self.work.request.n or 1) + delta.index
        piece = self.work.choices[index].piece(delta)
        if self.work.request.return_token_ids:
            piece["token_ids"] = delta.token_ids
        return piece

    def says(self, delta: StreamDelta) -> bool:
        """Whether a client learns anything from a delta: text may be held back."""
        request = self.work.request
        told = request.logprobs is not None and request.logprobs is not False  # 0 asks for the sampled token's own
        return bool(delta.text or delta.finish_reason or request.return_token_ids or told)

    def undrawn(self, index: int) -> dict[str, Any]:
        """The piece of a choice that is to have no tokens."""
        return self.work.choices[index].piece(StreamDelta(0, [], raw_logprobs=[], finish_reason="length"))

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A chunk of a stream."""
        kind = self.work.kind if self.work.kind == "text_completion" else "chat.completion.chunk"
        return {**self.head, "object": kind, "choices": choices} | ({"usage": None} if self.work.request.wants_usage else {})

    def whole(self, pieces: list[list[dict[str, Any]]]) -> dict[str, Any]:
        """The answer in one object, from the pieces of each choice."""
        choices = []
        per_prompt = self.work.request.n or 1
        for index, (choice, parts) in enumerate(zip(self.work.choices, pieces, strict=True)):
            choices.append(choice.whole(parts))
            if self.work.request.return_token_ids:
                choices[-1]["token_ids"] = [token for part in parts for token in part.get("token_ids", ())]
                choices[-1]["prompt_token_ids"] = self.work.prompts[index // per_prompt].ids
        return {**self.head, "object": self.work.kind, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Token counts; a prompt counts once, whatever n."""
        counts = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}
        return counts | {"total_tokens": self.prompt_tokens + self.completion_tokens}


async def _whole(writer: _Writer, streams: list[Stream]) -> dict[str, Any]:
    openings = [choice.opening() for choice in writer.work.choices]
    pieces: list[list[dict[str, Any]]] = [[] if opening is None else [opening] for opening in openings]
    if not writer.drawing:
        pieces = [[*parts, writer.undrawn(index)] for index, parts in enumerate(pieces)]
    for number, stream in enumerate(streams):
        await stream.finished()
        async for delta in stream:
            piece = writer.piece(number, delta)
            pieces[piece["index"]].append(piece)
    return writer.whole(pieces)


async def _chunks(writer: _Writer, streams: list[Stream]) -> AsyncGenerator[dict[str, Any], None]:
    try:
        for choice in writer.work.choices:
            opening = choice.opening()
            if opening is not None:
                yield writer.chunk([opening])
        if not writer.drawing:
            for index in range(len(writer.work.choices)):
                yield writer.chunk([writer.undrawn(index)])
        async for number, delta in _merged(streams):
            piece = writer.piece(number, delta)
            if writer.says(delta):
                yield writer.chunk([piece])
        if writer.work.request.wants_usage:
            yield writer.chunk([]) | {"usage": writer.usage()}
    finally:
        _close(streams)


async def _merged(streams: list[Stream]) -> AsyncIterator[tuple[int, StreamDelta]]:
    """The deltas of all streams as they come, with the stream's number."""
    if len(streams) == 1:
        async for delta in streams[0]:
            yield 0, delta
        return
    waiting = {asyncio.ensure_future(anext(stream)): (number, stream) for number, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number, stream = waiting.pop(task)
                try:
                    delta = task.result()
                except StopAsyncIteration:
                    continue
                waiting[asyncio.ensure_future(anext(stream))] = number, stream
                yield number, delta
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
