"""The application: OpenAI's endpoints over a live engine, with nothing that reaches beyond its own socket."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastalign import __version__
from fastalign.generation.asynchronous import AsyncEngine
from fastalign.serving.answers import answer, chat_work, completion_work
from fastalign.serving.connection import CLIENT_GONE, ClientGoneError, while_connected
from fastalign.serving.errors import ApiError, install
from fastalign.serving.metrics import render
from fastalign.serving.protocol import ChatRequest, CompletionRequest
from fastalign.serving.service import Service


def create_app(engine: AsyncEngine, *, name: str, api_key: str = "", api_docs: bool = False) -> FastAPI:
    """An ASGI application with /v1/models, /v1/completions, /v1/chat/completions, /health and /metrics.

    Args:
        engine: over an engine with a tokenizer. The application does not close it.
        name: what clients call the model.
        api_key: what clients must send as their bearer token; empty: nothing is asked for. /health is open to all.
        api_docs: serve /docs, /redoc and /openapi.json; the pages load their scripts from a public CDN.
    """
    pages = {} if api_docs else {"openapi_url": None, "docs_url": None, "redoc_url": None}
    app = FastAPI(title="fastalign", version=__version__, **pages)  # type: ignore[arg-type]
    service = app.state.service = Service(engine, name)
    install(app)
    _add_generation(app, service)
    _add_status(app, service)
    app.add_middleware(Gate, service=service, api_key=api_key)
    return app


def _add_generation(app: FastAPI, service: Service) -> None:
    async def respond(work_of: Callable[..., Any], body: CompletionRequest | ChatRequest, request: Request) -> Response:
        service.check_model(body.model)
        try:
            work = await while_connected(request.receive, work_of(service, body))
        except ClientGoneError:
            return Response(status_code=CLIENT_GONE)
        return await answer(service, work, request.receive)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await respond(completion_work, body, request)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await respond(chat_work, body, request)


def _add_status(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.card()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return service.card()

    @app.get("/health")
    async def health() -> JSONResponse:
        failure = service.engine.failure
        if failure is None:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "dead", "error": f"{type(failure).__name__}: {failure}"}, 503)

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(render(service), media_type="text/plain; version=0.0.4")


class Gate:
    """Asks for the key before a body is read, and counts the answers.

    Args:
        app: the application inside.
        service: has the counts.
        api_key: the expected bearer token; empty: none.
    """

    def __init__(self, app: ASGIApp, service: Service, api_key: str) -> None:
        self.app, self.service, self.expected = app, service, f"Bearer {api_key}".encode() if api_key else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        send = self._counting(scope, send)
        given = dict(scope["headers"]).get(b"authorization", b"")
        if self.expected and scope["path"] != "/health" and not hmac.compare_digest(given, self.expected):
            hint = "the key is wrong" if given else "send the header Authorization: Bearer KEY"
            refusal = ApiError(f"this server asks for an API key: {hint}", status=401, code="invalid_api_key")
            await refusal.response()(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _counting(self, scope: Scope, send: Send) -> Callable[[Message], Awaitable[None]]:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.service.counts[f'requests_total{{status="{message["status"]}"}}'] += 1
            await send(message)

        return counted
