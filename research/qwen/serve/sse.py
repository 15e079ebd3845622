"""Server-sent events: a response that notices when its client leaves, and comments while there is nothing to say."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from research.qwen.serve.errors import ApiError, JsonResponse, describe, json_bytes, to_api_error

log = logging.getLogger(__name__)
T = TypeVar("T")

# For the OpenAPI document: what a route answers with, whole or streamed.
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer, or with stream its events",
        "content": {
            "application/json": {"schema": {"type": "object"}},
            "text/event-stream": {},  # OpenAPI 3.1 has no words for the schema of an event
        },
    }
}

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx would gather the events otherwise
CLIENT_GONE = 499  # nginx' status for a client that closed its connection; nobody reads it


def event(content: Any) -> bytes:
    """One event with a JSON body."""
    return b"data: " + json_bytes(content) + b"\n\n"


class EventStream(Response):
    """Sends what ``events`` yields until it ends, fails, or the client leaves; ``close`` is called in any case.

    An exception of the iterator becomes the last event, in the envelope of all errors. After ``ping_seconds`` without
    an event a comment is sent (0: never), so that proxies keep the connection open while a long prompt is read.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None], ping_seconds: float = 15.0):
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._events, self._close, self._ping = events, close, ping_seconds or None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the stream."""
        sender = asyncio.ensure_future(self._send_all(send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((sender, gone), return_when=asyncio.FIRST_COMPLETED)
            if sender.done():
                sender.result()
        except OSError:
            log.debug("the connection broke")  # nobody is left to tell
        finally:
            self._close()  # before anything is awaited: the model must not go on for nobody
            await _cancel(sender, gone)

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        step: asyncio.Future[bytes] | None = None
        try:
            while True:
                step = step or asyncio.ensure_future(anext(self._events))  # type: ignore[arg-type]
                await asyncio.wait((step,), timeout=self._ping)
                if not step.done():
                    await send(_body(PING))
                    continue
                finished, step = step, None
                try:
                    content = finished.result()
                except StopAsyncIteration:
                    break
                except Exception as error:
                    await send(_body(_error_event(error)))
                    break
                await send(_body(content))
            await send(_body(b"", more=False))
        finally:
            if step is not None:
                await _cancel(step)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled when the client leaves (ApiError 499 that nobody reads)."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(CLIENT_GONE, "the client closed the connection")
        return task.result()
    finally:
        await _cancel(task, gone)


async def respond(
    request: Request,
    answer: AsyncIterator[bytes] | Coroutine[Any, Any, dict[str, Any]],
    end: Callable[[], None],
    ping_seconds: float,
) -> Response:
    """The response to a request: events as they come, or the whole body once it is there; ``end`` is called after."""
    if isinstance(answer, AsyncIterator):
        return EventStream(answer, end, ping_seconds)
    try:
        return JsonResponse(await unless_gone(request, answer))
    finally:
        end()


def _body(content: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": content, "more_body": more}


def _error_event(error: Exception) -> bytes:
    api = to_api_error(error)
    if api.status_code >= 500:
        log.error("a stream failed: %s", describe(error))
    return event(api.body())


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    """End tasks and wait until they have cleaned up; what they raise now concerns nobody."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
