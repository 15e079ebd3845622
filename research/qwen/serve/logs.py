"""Log lines as JSON, one per request, without any text of users; and the id that ties a line to its request."""

from __future__ import annotations

import contextvars
import json
import logging
import re
import secrets
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from research.qwen.serve.errors import describe

HEADER = b"x-request-id"
FIELDS = "qwen.log"  # key of the scope under which a request collects the fields of its line
LEVELS = ("debug", "info", "warning", "error")

# What clients send goes into logs and headers, so only harmless ids are taken over.
_HARMLESS = re.compile(rb"[A-Za-z0-9._:-]{1,128}")

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")
log = logging.getLogger(__name__)

Observe = Callable[[str, str, int, float], None]  # route, method, status, seconds


class HasScope(Protocol):
    """A Request, or anything else with the ASGI scope of one."""

    scope: Any


def note(request: HasScope, **values: str | int | float | bool | None) -> None:
    """Add fields to the log line of a request. Counts, names and reasons only, never text of a user."""
    request.scope.setdefault(FIELDS, {}).update(values)


class RequestLog:
    """ASGI: takes or makes the request id, returns it as x-request-id, and logs and counts the request at its end."""

    def __init__(self, app: ASGIApp, observe: Observe | None = None):
        self.app, self.observe = app, observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        name = _incoming_id(scope) or f"req-{secrets.token_hex(12)}"
        token = request_id.set(name)
        scope["qwen.id"], scope[FIELDS] = name, {}
        ended = _Ending(send, name)
        started = time.monotonic()
        try:
            await self.app(scope, receive, ended)
        finally:
            self._record(scope, ended, time.monotonic() - started)
            request_id.reset(token)

    def _record(self, scope: Scope, ended: _Ending, seconds: float) -> None:
        route, method = _route(scope), str(scope["method"])
        status = ended.status or 499  # the client left before there was an answer
        if self.observe is not None:
            self.observe(route, method, status, seconds)
        level = logging.DEBUG if route in ("/health", "/metrics") else logging.INFO
        fields = {"method": method, "route": route, "status": status, "ms": round(seconds * 1000, 1)}
        if not ended.complete:
            fields["aborted"] = True
        log.log(level, "request", extra={FIELDS: fields | scope[FIELDS]})


class _Ending:
    """The ``send`` of a request that remembers how its answer began and whether it came to its end."""

    def __init__(self, send: Send, name: str):
        self.send, self.name = send, name
        self.status, self.complete = 0, False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [pair for pair in message.get("headers", []) if pair[0].lower() != HEADER]
            message = {**message, "headers": [*headers, (HEADER, self.name.encode())]}
        await self.send(message)
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self.complete = True


def _incoming_id(scope: Scope) -> str | None:
    for key, value in scope["headers"]:
        if key == HEADER and _HARMLESS.fullmatch(value):
            return str(value.decode())
    return None


def _route(scope: Scope) -> str:
    """The route's template: paths themselves may be anything a client makes up."""
    return str(getattr(scope.get("route"), "path", "") or "other")


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, event, request_id if there is one, and the fields of the event."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        if name := request_id.get():
            line["request_id"] = name
        line |= getattr(record, FIELDS, {})
        if record.exc_info and record.exc_info[1] is not None:
            line["exception"] = describe(record.exc_info[1])
        return json.dumps(line, ensure_ascii=True, default=str)


def configure(level: str, stream: Any = None) -> None:
    """Send all logging of the process to ``stream`` (standard error) as JSON; ours from ``level`` on."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("research.qwen").setLevel(level.upper())
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
