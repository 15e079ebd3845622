"""The size of a request body and the time it may take, for bodies with a length and for chunked ones."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from research.qwen.serve.errors import ApiError, JsonResponse

DISCARD_SECONDS = 2.0  # how long what comes behind the limit is read and thrown away


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
        error = None
        body = _Body(receive)
        try:
            async with asyncio.timeout(self.seconds):
                content = await self._read(scope, body)
        except TimeoutError:
            error = ApiError(408, f"the body did not arrive within {self.seconds:g} s", code="body_timeout")
        except ApiError as too_large:
            error = too_large
        if error is not None:
            await self._refuse(error, body, send)
        elif content is not None:  # else the client has left
            await self.app(scope, _replay(content, receive), send)

    async def _read(self, scope: Scope, body: _Body) -> bytes | None:
        declared = next((value for key, value in scope["headers"] if key == b"content-length"), b"0")
        if declared.isdigit() and int(declared) > self.max_body:
            raise self._too_large()
        pieces = []
        while not body.ended:
            pieces.append(await body.read())
            if body.size > self.max_body:
                raise self._too_large()
        return None if body.left else b"".join(pieces)

    async def _refuse(self, error: ApiError, body: _Body, send: Send) -> None:
        """Answer, and let the client finish sending within reason: else many see a broken pipe and no answer."""
        headers = {**(error.headers or {}), "Connection": "close"}
        response = JsonResponse(error.body(), error.status_code, headers=headers)
        await send(
            {"type": "http.response.start", "status": error.status_code, "headers": response.raw_headers}
        )
        await send({"type": "http.response.body", "body": response.body, "more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(DISCARD_SECONDS, self.seconds)):
                while not body.ended and body.size < 4 * self.max_body:
                    await body.read()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self.max_body} bytes", code="body_too_large")


class _Body:
    """A body while it comes in."""

    def __init__(self, receive: Receive):
        self._receive = receive
        self.size, self.ended, self.left = 0, False, False

    async def read(self) -> bytes:
        """The next piece; ``ended`` behind the last, ``left`` if the client closed the connection."""
        message = await self._receive()
        piece: bytes = message.get("body", b"")
        self.size += len(piece)
        self.left = message["type"] == "http.disconnect"
        self.ended = self.left or not message.get("more_body", False)
        return piece


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
