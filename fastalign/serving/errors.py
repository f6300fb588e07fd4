"""Errors as OpenAI's clients read them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from fastalign.catalogue import nearest
from fastalign.generation.asynchronous import EngineClosedError, EngineFailedError, EngineFullError
from fastalign.serving.protocol import FIELDS

log = logging.getLogger("fastalign")

TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 503: "overloaded_error"}


class ApiError(Exception):
    """What is answered instead of a result.

    Args:
        message: what was expected, what was got and what to do.
        status: the HTTP status.
        param: the request's field that is wrong, if one is.
        code: a word that programs can compare.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The object that is sent."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The object with its status."""
        headers = {503: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(self.status)
        return JSONResponse(self.body, self.status, headers)


def as_api_error(error: BaseException) -> ApiError:
    """Any exception as what the client is told of it; the details of our own mistakes go to the log alone."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineFullError):
        return ApiError(str(error), status=503, code="engine_full")
    if isinstance(error, EngineClosedError):
        return ApiError("the server is shutting down", status=503, code="shutting_down")
    if isinstance(error, EngineFailedError):
        return ApiError(str(error), status=500, code="engine_failed")
    log.error("a request failed", exc_info=error)
    return ApiError(f"internal error: {type(error).__name__}; the server's log says more", status=500, code="internal_error")


@contextmanager
def refusing() -> Iterator[None]:
    """Around calls that check what a client asked for: what they refuse is the client's error."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ApiError(str(error)) from error


def install(app: FastAPI) -> None:
    """Has the application answer every error this way."""

    async def invalid(request: Request, error: Any) -> JSONResponse:
        return validation_error(error.errors()).response()

    async def refused(request: Request, error: Any) -> JSONResponse:
        what = f"{request.method} {request.url.path}"
        messages = {404: f"there is no {what}", 405: f"{what}: this path takes another method"}
        return ApiError(messages.get(error.status_code, str(error.detail)), status=error.status_code).response()

    async def failed(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, refused)
    for kind in (ApiError, EngineFullError, EngineClosedError, EngineFailedError, Exception):
        app.add_exception_handler(kind, failed)


def validation_error(errors: Any) -> ApiError:
    """The first thing that is wrong with a body, in one sentence."""
    error: Mapping[str, Any] = errors[0]
    place = [part for part in error["loc"][1:] if isinstance(part, int) or part in FIELDS or error["type"] == "extra_forbidden"]
    if error["type"] == "json_invalid":
        return ApiError(f"the body is not valid JSON: {error['ctx']['error']} at character {error['loc'][-1]}", code="invalid_json")
    if not place:
        return ApiError("expected a JSON object as the body, with Content-Type: application/json", code="invalid_json")
    param = str(place[0])
    if error["type"] == "extra_forbidden" and error["loc"][-1] in FIELDS:
        return ApiError(f"unknown field {error['loc'][-1]}: it has no place here", param=param, code="unknown_field")
    if error["type"] == "extra_forbidden":
        return ApiError(nearest(str(error["loc"][-1]), FIELDS, prefix="field "), param=str(error["loc"][-1]), code="unknown_field")
    if error["type"] == "missing":
        return ApiError(f"{param} is required", param=param, code="missing_field")
    expected = error["msg"].removeprefix("Input should be ")
    return ApiError(f"{param}: expected {expected}, got {str(error['input'])[:80]!r}", param=param, code="invalid_value")
