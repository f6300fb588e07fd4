"""Work for a client that may go away: server-sent events, and results that nobody may want any more."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import Any, TypeVar

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from fastalign.serving.errors import as_api_error

T = TypeVar("T")

CLIENT_GONE = 499  # nobody reads it; for our own counts


class ClientGoneError(Exception):
    """The client closed its connection before it had its answer."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Does the work unless the client goes away first, which cancels it.

    Args:
        receive: the ASGI channel of a request whose body has been read.

    Raises:
        ClientGoneError: the client went away. Besides, whatever the work raises.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends objects as server-sent events, then [DONE]; stops the source when the client goes away.

    An exception of the source is the last event, an error object: the status has been sent already.

    Args:
        source: gives the objects.
    """

    media_type = "text/event-stream"

    def __init__(self, source: AsyncGenerator[Mapping[str, Any], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await while_connected(receive, self._pump(send))
        except (ClientGoneError, OSError):
            return
        finally:
            await self.source.aclose()

    async def _pump(self, send: Send) -> None:
        try:
            async for value in self.source:
                await _event(send, json.dumps(value, ensure_ascii=False, separators=(",", ":")))
        except OSError:
            raise
        except Exception as error:
            await _event(send, json.dumps(as_api_error(error).body, ensure_ascii=False))
        else:
            await _event(send, "[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _event(send: Send, data: str) -> None:
    await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})
