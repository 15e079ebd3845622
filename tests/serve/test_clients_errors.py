"""What openai-python does with our failures: the class it raises, whether it tries again, and when."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from research.qwen.decode.params import SamplingParams
from research.qwen.serve.app import create_app
from research.qwen.serve.state import ServerSettings, ServerState
from tests.serve.running import fake_engine, running_state, serve_app
from tests.serve.scripted import Script, scripted_server
from tests.serve.test_http_limits import Blocked
from tests.serve.test_stream import eventually

pytestmark = pytest.mark.slow

WISH: Any = {"model": "qwen", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 40}


class Sleeps(list[float]):
    """The pauses of a client before it tries again; ``then`` is what happens meanwhile."""

    then: Callable[[], object] = staticmethod(lambda: None)

    def sleep(self, seconds: float) -> None:
        self.append(seconds)
        self.then()

    async def wait(self, seconds: float) -> None:
        self.sleep(seconds)


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> Sleeps:
    sleeps = Sleeps()
    clock = SimpleNamespace(**{**vars(time), "sleep": sleeps.sleep})
    monkeypatch.setattr("openai._base_client.time", clock)
    monkeypatch.setattr("openai._base_client.anyio.sleep", sleeps.wait)
    return sleeps


@pytest.fixture(scope="module")
def server() -> Iterator[Script]:
    with scripted_server("word " * 30, ServerSettings(ping_seconds=0.05)) as script:
        yield script


def client_of(url: object, **options: Any) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", **{"api_key": "unused", "timeout": 20, **options})


def test_a_loading_server_is_asked_again_when_it_said(sleeps: Sleeps) -> None:
    loading = ServerState(ServerSettings())
    with running_state(fake_engine()) as ready, serve_app(create_app(loading)) as url:
        sleeps.then = lambda: loading.attach(ready.engine, ready.scheduler)
        answer = client_of(url).completions.create(model="qwen", prompt="a", max_tokens=1)
        assert answer.choices and sleeps == [5.0]
        loading.begin_drain()
        with pytest.raises(openai.InternalServerError) as draining:
            client_of(url, max_retries=1).chat.completions.create(**WISH)
        assert draining.value.status_code == 503 and draining.value.type == "service_unavailable_error"
        assert sleeps == [5.0, 5.0]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_queue_is_asked_again_when_it_said(sleeps: Sleeps, asynchronous: bool) -> None:
    with running_state(fake_engine(), max_queue=1) as state, serve_app(create_app(state)) as url:
        blocked = Blocked(state)
        state.submit([1, 2], SamplingParams(max_new_tokens=1), lambda _: None)

        def go() -> None:
            blocked.go.set()
            eventually(lambda: state.scheduler.stats().running + state.scheduler.stats().waiting == 0)

        with pytest.raises(openai.RateLimitError) as full:
            client_of(url, max_retries=0).chat.completions.create(**WISH)
        assert full.value.code == "queue_full" and sleeps == []
        sleeps.then = go
        answer = _created_async(url) if asynchronous else client_of(url).chat.completions.create(**WISH)
        assert answer.choices and sleeps == [1.0]


def _created_async(url: str) -> Any:
    async def create() -> Any:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", timeout=20) as client:
            return await client.chat.completions.create(**WISH)

    return asyncio.run(create())


def test_what_would_fail_again_is_tried_once(server: Script, sleeps: Sleeps) -> None:
    server.fresh("word " * 30)
    client = client_of(server.client.base_url)
    server.lm.fail_at = server.lm.steps + 3
    with pytest.raises(openai.InternalServerError) as broken:
        client.chat.completions.create(**WISH)
    server.lm.fail_at = None
    assert broken.value.status_code == 500 and "secret" not in str(broken.value) and broken.value.request_id
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**{**WISH, "max_tokens": 100000})
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**{**WISH, "model": "gpt-4"})
    assert sleeps == [] and client.chat.completions.create(**WISH).choices


def test_keys_bodies_and_hosts(sleeps: Sleeps) -> None:
    settings = ServerSettings(api_keys=("right",), max_body=1000)
    with running_state(fake_engine(), settings) as state, serve_app(create_app(state)) as url:
        with pytest.raises(openai.AuthenticationError) as stranger:
            client_of(url, api_key="wrong").models.list()
        assert stranger.value.code == "invalid_api_key"
        assert client_of(url, api_key="right").models.retrieve("qwen").id == "qwen"
        with pytest.raises(openai.APIStatusError) as large:
            client_of(url, api_key="right").completions.create(model="qwen", prompt="a" * 2000)
        assert large.value.status_code == 413
    assert sleeps == []


def test_a_host_of_others(sleeps: Sleeps) -> None:
    settings = ServerSettings(check_host=True)
    with running_state(fake_engine(), settings) as state, serve_app(create_app(state)) as url:
        with pytest.raises(openai.PermissionDeniedError):
            client_of(url, default_headers={"Host": "evil.example"}).models.list()
        assert client_of(url).models.list().data and sleeps == []


def test_an_error_in_a_stream_is_raised(server: Script, sleeps: Sleeps) -> None:
    server.fresh("word " * 30)
    server.lm.fail_at = server.lm.steps + 5
    pieces: list[Any] = []
    with pytest.raises(openai.APIError) as broken:
        pieces.extend(client_of(server.client.base_url).chat.completions.create(**WISH, stream=True))
    server.lm.fail_at = None
    assert len(pieces) > 2 and "internal error" in broken.value.message and sleeps == []


def test_closing_a_stream_ends_the_request(server: Script) -> None:
    server.fresh("word " * 30)
    stats = server.state.scheduler.stats
    before = stats().finished.get("cancelled", 0)
    server.lm.fail_at = None
    with client_of(server.client.base_url).chat.completions.create(
        **{**WISH, "max_tokens": 400, "extra_body": {"ignore_eos": True}}, stream=True
    ) as stream:
        next(iter(stream))
    eventually(lambda: stats().finished.get("cancelled", 0) == before + 1)
    eventually(lambda: stats().blocks_used == 0)


def test_comments_of_a_silent_stream_are_passed_over(server: Script) -> None:
    server.fresh("hello 你好 🙂")
    server.lm.gate, server.lm.free_steps = threading.Event(), server.lm.steps
    threading.Timer(0.2, server.lm.gate.set).start()
    stream = client_of(server.client.base_url).chat.completions.create(**WISH, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "hello 你好 🙂"
