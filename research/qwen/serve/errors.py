"""Every failure as one envelope: ``{"error": {"message", "type", "param", "code"}}`` with the status clients act on.

Clients retry 408, 409, 429 and everything from 500 on: what would fail again is a 4xx, or says x-should-retry: false.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from research.qwen.errors import BusyError, ClosedError, QwenError

log = logging.getLogger(__name__)

BUSY_SECONDS, CLOSED_SECONDS = 1, 5  # Retry-After of a full queue, and of a server that loads or drains
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class ErrorDetail(BaseModel):
    """What went wrong, and where in the request."""

    message: str
    type: str
    param: str | None = None
    code: str | int | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is no success."""

    error: ErrorDetail


class ApiError(HTTPException):
    """A failure with its HTTP status; raise it anywhere below the app.

    Args:
        param: path of the field at fault, such as ``messages[0].content``.
        retry_after: seconds after which the same request may succeed; None: it will not.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | int | None = None,
        headers: Mapping[str, str] | None = None,
        retry_after: int | None = None,
    ):
        headers = dict(headers or {})
        if retry_after is not None:
            headers |= {"Retry-After": str(retry_after), "x-should-retry": "true"}
        elif status >= 500 or status in (408, 409, 429):
            headers["x-should-retry"] = "false"
        super().__init__(status, message, headers)
        default = "server_error" if status >= 500 else "invalid_request_error"
        self.message, self.type = message, type or TYPES.get(status, default)
        self.param, self.code = param, code

    def body(self) -> dict[str, Any]:
        """The envelope, also for ``data: {...}`` once a stream has begun."""
        detail = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": detail}


class JsonResponse(JSONResponse):
    """JSON in UTF-8; a lone surrogate in a text becomes ``?`` instead of failing."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The bytes of the body; ValueError for NaN and infinities, which JSON does not have."""
        return json_bytes(content)


def json_bytes(content: Any) -> bytes:
    """Compact JSON of any value, as UTF-8."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


def to_api_error(error: BaseException, *, param: str | None = None) -> ApiError:
    """What a client is told of an exception; of one that is not meant for users only that it happened."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return _from_validation(error)
    if isinstance(error, HTTPException):
        return _from_http(error)
    if isinstance(error, BusyError):
        return ApiError(429, str(error), code="queue_full", retry_after=BUSY_SECONDS)
    if isinstance(error, ClosedError):
        return ApiError(503, str(error), code="unavailable", retry_after=CLOSED_SECONDS)
    if isinstance(error, QwenError):
        return ApiError(400, str(error), param=getattr(error, "param", None) or param)
    return ApiError(500, "internal error; the server's log has it under the request id", code="internal")


def error_response(error: BaseException) -> Response:
    """The envelope of an exception as a response."""
    api = to_api_error(error)
    return JsonResponse(api.body(), api.status_code, headers=dict(api.headers or {}))


def _from_http(error: HTTPException) -> ApiError:
    status = error.status_code
    code = {404: "route_not_found", 405: "method_not_allowed"}.get(status)
    message = str(error.detail or HTTPStatus(status).phrase)
    if status == 404 and message == "Not Found":
        message = "there is no such route; GET /openapi.json lists them"
    elif status == 405:
        message = "the route does not take this method"
    return ApiError(status, message, code=code, headers=error.headers)


def _from_validation(error: RequestValidationError) -> ApiError:
    if isinstance(error.body, bytes):  # FastAPI reads JSON only where the header says so, see docs/server.md
        return ApiError(415, "send JSON, with Content-Type: application/json", code="unsupported_media_type")
    found = error.errors()
    first = found[0]
    location = tuple(first.get("loc", ()))
    if first.get("type") == "json_invalid":
        reason = first.get("ctx", {}).get("error", "it cannot be read")
        return ApiError(400, f"the body is not valid JSON: {reason}", code="invalid_json")
    param = param_path(location, error.body, first.get("type") == "missing")
    # Of a field that may be one thing or another, each branch says what it wanted.
    wanted = [_wish(other) for other in found if param_path(tuple(other["loc"]), error.body, False) == param]
    message = "; or ".join(dict.fromkeys(wanted or [_wish(first)]))
    return ApiError(400, f"{param or 'the body'}: {message}", param=param)


def _wish(found: Mapping[str, Any]) -> str:
    message = str(found.get("msg", "it is not valid")).removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def param_path(location: tuple[int | str, ...], body: Any, missing: bool) -> str | None:
    """``messages[0].content`` out of a validator's location, which also names the branches of unions.

    A part counts if the body has it there; with ``missing`` so does the last one.
    """
    if location[:1] and location[0] in ("query", "path", "header"):
        return ".".join(str(part) for part in location[1:]) or None
    path, here = "", body
    parts = location[1:] if location[:1] == ("body",) else location
    for place, part in enumerate(parts):
        if isinstance(part, int) and isinstance(here, list) and part < len(here):
            path, here = f"{path}[{part}]", here[part]
        elif not isinstance(part, str) or not isinstance(here, Mapping):
            continue
        elif part in here or (missing and place == len(parts) - 1):
            path, here = f"{path}.{part}" if path else part, here.get(part)
    return path or None


async def _handle(request: Request, error: Exception) -> Response:
    return error_response(error)


def install(app: FastAPI) -> None:
    """Give the app the handlers of all errors that are raised below it."""
    for kind in (RequestValidationError, HTTPException, QwenError):
        app.add_exception_handler(kind, _handle)


class Guard:
    """ASGI: an exception nobody handled becomes a 500 without internals; the log gets its kind and place only."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception as error:
            if scope["type"] != "http":
                raise
            log.error("unhandled %s", describe(error))
            if started:
                raise  # too late for a status: the connection is cut
            await error_response(error)(scope, receive, send)


def describe(error: BaseException) -> str:
    """Kind and place of an exception, without its message: that may hold text of a user."""
    place, trace = "", error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        place = f"{code.co_filename.rsplit('/', 1)[-1]}:{trace.tb_lineno} in {code.co_name}"
        trace = trace.tb_next
    return f"{type(error).__name__} at {place}" if place else type(error).__name__
