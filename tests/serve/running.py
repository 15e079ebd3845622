"""Servers for tests: an app on a free loopback port, and states with a fake or the demo model behind them."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from research.qwen.demo import demo_folder
from research.qwen.engine import Engine
from research.qwen.serve.app import create_app
from research.qwen.serve.state import ServerSettings, ServerState
from research.qwen.text.tokenizer import QwenTokenizer
from tests.fakes import FakeLM


@contextlib.contextmanager
def serve_app(app: FastAPI, **options: Any) -> Iterator[str]:
    """Run the app with uvicorn in a thread; the value is its base URL, without a slash at the end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=2, **options)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive(), "the server did not start"
                time.sleep(0.005)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)
            assert not thread.is_alive(), "the server does not stop"


def demo_tokenizer() -> QwenTokenizer:
    """The vocabulary of the demo model: about a thousand tokens, Chinese and control tokens among them."""
    return QwenTokenizer(demo_folder() / "qwen.tiktoken")


def fake_engine(num_blocks: int = 256, max_length: int = 512, **options: Any) -> Engine:
    """An engine whose model says random but reproducible tokens of the demo vocabulary."""
    tokenizer = demo_tokenizer()
    lm = FakeLM(num_blocks=num_blocks, vocab_size=len(tokenizer), max_length=max_length)
    return Engine(lm, tokenizer, generation={"chat_format": "chatml"}, **options)


@contextlib.contextmanager
def running_state(
    engine: Engine, settings: ServerSettings | None = None, **options: Any
) -> Iterator[ServerState]:
    """A ready state around the engine, its scheduler running; ``options`` are those of ``Scheduler``."""
    from research.qwen.scheduler import Scheduler

    scheduler = Scheduler(engine, **options)
    scheduler.start()
    try:
        assert scheduler.wait_ready(60), "the scheduler does not get ready"
        yield ServerState(settings or ServerSettings(), engine, scheduler)
    finally:
        scheduler.close()


@contextlib.contextmanager
def fake_client(settings: ServerSettings | None = None, **options: Any) -> Iterator[httpx.Client]:
    """A client of a ready server with the fake model."""
    with (
        running_state(fake_engine(), settings, **options) as state,
        serve_app(create_app(state)) as url,
        httpx.Client(base_url=url, timeout=30) as client,
    ):
        yield client


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a response, whose envelope is checked."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert body["error"]["message"] and isinstance(body["error"]["type"], str)
    error: dict[str, Any] = body["error"]
    return error
