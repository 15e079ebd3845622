"""An OpenAI server that says what a test scripts, with the real page in front of it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from research.qwen.serve import errors, page
from tests.serve.running import serve_app

MODEL = "qwen-test"


@dataclass(frozen=True)
class Wait:
    """A point of the stream at which the server waits until the test calls ``release``."""


@dataclass(frozen=True)
class Break:
    """A point at which the connection ends without the last event."""


@dataclass
class Reply:
    """One answer: text pieces, call deltas, raw events or waits; or a status with an error body."""

    pieces: list[Any] = field(default_factory=list)
    finish: str = "stop"
    status: int = 200
    message: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    usage: tuple[int, int, int] = (12, 5, 0)
    split: int = 0  # bytes per piece on the wire; 0: one event at a time


class Script:
    """Replies to come, and what the page sent."""

    def __init__(self) -> None:
        self.replies: deque[Reply] = deque()
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.disconnects = 0
        self.key = ""
        self.health = 200
        self._released = threading.Event()

    def reset(self) -> None:
        """As new, for the next test."""
        self.release()
        self.__init__()  # type: ignore[misc]

    def say(self, *pieces: Any, **options: Any) -> None:
        """Adds a reply."""
        self.replies.append(Reply(list(pieces), **options))

    def release(self) -> None:
        """Lets a stream go on behind its ``Wait``."""
        self._released.set()

    async def wait(self) -> None:
        """Waits for ``release``."""
        while not self._released.is_set():
            await asyncio.sleep(0.005)
        self._released.clear()


def scripted_app(script: Script) -> FastAPI:
    """The page and the three routes it uses."""
    app = FastAPI()
    app.include_router(page.router)
    errors.install(app)

    @app.get("/health")
    def health() -> Response:
        return Response(status_code=script.health)

    @app.get("/v1/models")
    def models(request: Request) -> Response:
        if not allowed(script, request):
            return refusal(Reply(status=401, message="Wrong key."))
        names = [MODEL, "qwen-other"]
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"} for name in names]})

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        script.bodies.append(await request.json())
        script.keys.append(request.headers.get("authorization"))
        if not allowed(script, request):
            return refusal(Reply(status=401, message="Wrong key."))
        reply = script.replies.popleft()
        if reply.status != 200:
            return refusal(reply)
        return StreamingResponse(body(script, reply), media_type="text/event-stream", headers=reply.headers)

    return app


def allowed(script: Script, request: Request) -> bool:
    """Whether the request carries the key, if there is one."""
    return not script.key or request.headers.get("authorization") == f"Bearer {script.key}"


def refusal(reply: Reply) -> Response:
    """An error in OpenAI's envelope."""
    error = {"message": reply.message, "type": "error", "param": None, "code": None}
    headers = {"x-request-id": "req-1", **reply.headers}
    return JSONResponse({"error": error}, status_code=reply.status, headers=headers)


async def body(script: Script, reply: Reply) -> AsyncIterator[bytes]:
    """The stream, in events or in pieces of ``split`` bytes that respect no border."""
    try:
        async for event in events(script, reply):
            step = reply.split or len(event)
            for at in range(0, len(event), step):
                yield event[at : at + step]
                if reply.split:
                    await asyncio.sleep(0)
    except asyncio.CancelledError:
        script.disconnects += 1
        raise


async def events(script: Script, reply: Reply) -> AsyncIterator[bytes]:
    """Server-sent events of the reply."""
    yield event(delta={"role": "assistant", "content": ""})
    for piece in reply.pieces:
        if isinstance(piece, Wait):
            await script.wait()
        elif isinstance(piece, Break):
            return
        elif isinstance(piece, bytes):
            yield piece
        else:
            yield event(delta={"content": piece} if isinstance(piece, str) else {"tool_calls": [piece]})
    yield event(delta={}, finish_reason=reply.finish)
    prompt, completion, cached = reply.usage
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    yield event(usage={**counts, "prompt_tokens_details": {"cached_tokens": cached}})
    yield b"data: [DONE]\n\n"


def event(usage: dict[str, Any] | None = None, **choice: Any) -> bytes:
    """One chunk of a chat completion as an event."""
    choices = [{"index": 0, "finish_reason": None, **choice}] if choice else []
    chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": MODEL, "choices": choices}
    return f"data: {json.dumps({**chunk, 'usage': usage}, ensure_ascii=False)}\n\n".encode()


def call(index: int, arguments: str, name: str = "", call_id: str = "") -> dict[str, Any]:
    """A piece of a tool call; name and id belong to its first piece."""
    piece: dict[str, Any] = {"index": index, "function": {"arguments": arguments}}
    if name:
        piece |= {"id": call_id, "type": "function"}
        piece["function"]["name"] = name
    return piece


@contextmanager
def scripted_server() -> Iterator[tuple[str, Script]]:
    """Base URL and script of a running server."""
    script = Script()
    with serve_app(scripted_app(script)) as url:
        try:
            yield url, script
        finally:
            script.release()
