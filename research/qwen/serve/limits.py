"""The size of a request body and the time it may take, for bodies with a length and for chunked ones."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from research.qwen.serve.errors import ApiError, error_response

DRAIN_SECONDS = 2.0  # how long what comes behind the limit is read and thrown away


class BodyLimit:
    """ASGI: reads the body before the app runs; 413 for a body that is too large, 408 for one that is too slow.

    Every route needs the whole body anyway, and so none begins to work on one that turns out too large.
    """

    def __init__(self, app: ASGIApp, max_body: int, seconds: float):
        self.app, self.max_body, self.seconds = app, max_body, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or not _has_body(scope):
            await self.app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self.seconds):
                body = await self._read(scope, receive)
        except TimeoutError:
            error = ApiError(408, f"the body did not arrive within {self.seconds:g} s", code="body_timeout")
            await _refuse(error, scope, receive, send)
            return
        except ApiError as error:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DRAIN_SECONDS):
                    await self._discard(receive)
            await _refuse(error, scope, receive, send)
            return
        if body is not None:  # else the client has left
            await self.app(scope, _replay(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        declared = next((value for key, value in scope["headers"] if key == b"content-length"), b"0")
        if declared.isdigit() and int(declared) > self.max_body:
            raise self._too_large()
        pieces, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            if size > self.max_body:
                raise self._too_large()
            if not message.get("more_body"):
                return b"".join(pieces)

    async def _discard(self, receive: Receive) -> None:
        """Let a client finish sending, within reason: many read no answer before, and see a broken pipe instead."""
        size = 0
        while size < 4 * self.max_body:
            message = await receive()
            size += len(message.get("body", b""))
            if message["type"] == "http.disconnect" or not message.get("more_body"):
                return

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self.max_body} bytes", code="body_too_large")


def _has_body(scope: Scope) -> bool:
    return any(
        key == b"transfer-encoding" or (key == b"content-length" and value != b"0")
        for key, value in scope["headers"]
    )


def _replay(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives the body in one piece, then what the server has (a disconnect)."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return pending.pop() if pending else await receive()

    return next_message


async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    error.headers = {**(error.headers or {}), "Connection": "close"}
    await error_response(error)(scope, receive, send)
